"""Stage 1: the local model is fine-tuned on explained scores, with LoRA."""
