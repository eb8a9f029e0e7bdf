"""`agiqa report`: results of ablations, transfers and single trainings as one page, tables, and pictures.

A report reads result folders only. Its metrics are those of `agiqa.heads.evaluation`.
"""
