"""Tables in LaTeX: compiled where there is a TeX, and else held to their structure."""

import re
import shutil
import subprocess

import pytest

from agiqa.bench.report.latex import latex_table, latex_text
from agiqa.bench.report.reading import read_all
from agiqa.bench.report.row_tables import main_tables
from agiqa.bench.report.sections import ReportSettings
from agiqa.bench.report.writing import write_report

PDFLATEX = shutil.which("pdflatex")
PAPER = r"""\documentclass[twocolumn]{article}
\usepackage[letterpaper,textwidth=6.75in,textheight=9in]{geometry}
\setlength{\columnsep}{0.25in}
\usepackage{array,booktabs,graphicx}
\begin{document}
Text.
%s
\end{document}
"""


@pytest.fixture(scope="module")
def files(results, tmp_path_factory):
    """The report of an ablation with LaTeX and PDF."""
    to = tmp_path_factory.mktemp("paper") / "report"
    return write_report([results.ablation, results.transfer], to, ReportSettings(latex=True, pdf=True))


def test_letters_that_latex_reads_as_commands_are_escaped():
    assert latex_text(r"50% of $a_b & {c} # ~ ^ \x") == (
        r"50\% of \$a\_b \& \{c\} \# \textasciitilde{} \textasciicircum{} \textbackslash{}x"
    )
    assert latex_text("Δ \N{MINUS SIGN}0.1 \N{EN DASH} a\N{NO-BREAK SPACE}· b") == (
        r"$\Delta$ $-$0.1 -- a~\textperiodcentered{} b"
    )


def test_a_table_has_the_rules_of_booktabs_and_a_cell_for_each_column(results):
    (found,) = read_all([results.ablation])
    table = main_tables(found)[0]
    texts = table.latex()
    assert list(texts) == [table.name, f"{table.name}-column"]
    for (name, text), kind in zip(texts.items(), ("table*", "table"), strict=True):
        assert [text.count(rf"\{rule}rule") for rule in ("top", "mid", "bottom")] == [1, 2, 1]
        assert f"\\begin{{{kind}}}" in text
        assert f"\\label{{tab:{name}}}" in text
        rows = [line for line in text.splitlines() if line.endswith(r"\\")]
        assert len(rows) == 1 + len(table.rows)
        assert len({len(re.findall(r"(?<!\\)&", row)) for row in rows}) == 1
    full, column = ("".join(line for line in text.splitlines() if not line.startswith("%")) for text in texts.values())
    assert "Δ" not in full
    assert r"$\Delta$ SRCC" in full
    assert r"\Delta" not in column


def test_letters_beyond_latin_are_told():
    plain, greek = (latex_table("t", "c", [], [[word]], ["l"], one_column=True) for word in ("abc", "αβγ"))
    assert "XeLaTeX" not in plain
    assert "XeLaTeX" in greek


def test_every_table_and_picture_of_a_report_has_its_file(files):
    tables = {path.name for path in files.tables}
    assert {"encoders-quality-grouped.tex", "encoders-quality-grouped-column.tex"} <= tables
    assert not any(path.suffix == ".tex" and "items" in path.name for path in files.tables)
    pictures = {path.stem for path in files.pictures}
    assert {path.stem for path in files.pictures if path.suffix == ".pdf"} == pictures


@pytest.mark.skipif(
    PDFLATEX is None, reason="there is no pdflatex: on Debian `apt-get install texlive-latex-recommended`"
)
def test_a_paper_with_all_tables_and_pictures_compiles_and_nothing_is_too_wide(files, tmp_path):
    inputs = [rf"\input{{{path}}}\clearpage" for path in files.tables if path.suffix == ".tex"]
    inputs += [
        rf"\begin{{figure}}\includegraphics{{{path}}}\end{{figure}}\clearpage"
        for path in files.pictures
        if path.suffix == ".pdf"
    ]
    (tmp_path / "paper.tex").write_text(PAPER % "\n".join(inputs), encoding="utf-8")
    command = [PDFLATEX, "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", check=False).stdout
    assert (tmp_path / "paper.pdf").is_file(), told[-2000:]
    assert re.findall(r"Overfull \\hbox.*", told) == []
