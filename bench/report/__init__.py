"""`agiqa report`: results of ablations and transfers as one page, tables in markdown and CSV, and pictures.

A report reads result folders only. It computes no metric of its own.
"""
