"""A store in three steps: plan it, fill its units, seal it."""
