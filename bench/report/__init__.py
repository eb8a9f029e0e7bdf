"""`agiqa report`: one page that holds everything, tables as markdown and CSV, and pictures.

It reads the folders of ablations and transfers only, and computes no metric of its own.
"""
