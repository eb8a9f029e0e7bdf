"""MiniCPM-Llama3-V-2.5, the model of the published M3-AGIQA adapters, without its remote code.

The published code needs an old transformers release and runs only as trusted remote code. This is the same model, made
of transformers' Llama and Idefics2 vision tower, a resampler and the slicing of images. Its tensors have the published
names, so published weights and adapters load by name.
"""
