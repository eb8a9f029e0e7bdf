"""`agiqa reproduce`: the tables of the M3-AGIQA paper, from published data and checkpoints."""
