"""Measurements of agiqa itself: speed, size, and the coverage of its intervals."""
