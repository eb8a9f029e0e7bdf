"""Questions about agiqa itself: how fast and how large, and whether its intervals cover."""
