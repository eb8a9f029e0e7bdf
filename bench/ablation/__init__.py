"""`agiqa ablate`: grids of heads, protocols, and the rows of a table."""
