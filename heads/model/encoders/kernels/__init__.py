"""What runs on GPUs: Triton kernels, the choice between them and torch, and training steps as CUDA graphs."""
