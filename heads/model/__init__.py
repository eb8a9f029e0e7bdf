"""The head: projection, encoder, pooling and regressor, and the losses that train it."""
