"""The head itself: projection, encoder, pooling, regressor, and the losses it is trained by."""
