"""Stage 2: the model describes and rates each image."""
