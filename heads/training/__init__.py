"""One training from a store to a run folder: learner, fit, resumption."""
