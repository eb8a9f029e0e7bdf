"""Evaluation of trained heads: metrics with intervals and p-values, prediction, leaks, run folders."""
