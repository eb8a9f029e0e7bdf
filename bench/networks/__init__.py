"""Image networks that are fine-tuned end to end, on the same splits as heads: Table II of the paper."""
