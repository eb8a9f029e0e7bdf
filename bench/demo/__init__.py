"""`agiqa demo`: drawn images, a tiny model, and all steps from these to a report."""
