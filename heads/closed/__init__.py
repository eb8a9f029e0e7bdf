"""Heads in closed form: fitted by linear algebra in seconds, without epochs."""
