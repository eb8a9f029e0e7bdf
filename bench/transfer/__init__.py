"""`agiqa transfer`: what a head of one data set is worth on another."""
