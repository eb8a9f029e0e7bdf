"""Stage 1: an online model explains the known scores of each image."""
