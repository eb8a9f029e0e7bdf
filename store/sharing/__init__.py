"""Stores at URLs: push, pull, and reading in place."""
