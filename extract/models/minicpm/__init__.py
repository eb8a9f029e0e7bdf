"""MiniCPM-Llama3-V-2.5, the model of the published M3-AGIQA adapters, without its remote code.

The published Python code runs only on the transformers of its time, and only as trusted remote code. Here is the same
model from its parts: transformers' Llama and Idefics2 vision tower, a resampler, and the way from an image to slices.
Module names are the published ones, so published weights and adapters load by name.
"""
