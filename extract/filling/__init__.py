"""Stage 3, phase 1: plan a store, run the model over its items, write the features."""
