"""What a head is and how it is trained: configs, presets, label names, device and precision."""
