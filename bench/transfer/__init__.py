"""`agiqa transfer`: how good a head of one data set is on another."""
