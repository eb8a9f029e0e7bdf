"""Stage 3, phase 1: plan a store, run the model over its items, write what it makes of them."""
