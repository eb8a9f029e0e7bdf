"""Settings of a head and its training: configs, presets, label names, device and precision."""
