"""The report of ablations and transfers: one page that holds everything, tables as markdown and CSV, and pictures.

It reads result folders only, and computes no metric of its own.

reading         the folders, forgivingly        page            the HTML, its style and its script
document        the same in markdown
row_tables      main tables, optimism           sections        what stands where, and what is missing
transfers       Table VI and few-shot           words           findings, methods, limits
paper           the paper's numbers beside      bookkeeping     provenance, failures, the bias of choosing on test
row_charts      intervals, curves               item_charts     Fig. 5 with residuals
rank_charts     energy and SRCC by rank         radar           Fig. 1
examples        Table VIII                      predictions     the test predictions behind a row
"""

from agiqa.bench.report.writing import Report, write_report

__all__ = ["Report", "write_report"]
