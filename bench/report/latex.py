"""Tables in LaTeX with booktabs, for papers with two columns of 3.25 inches."""

import re
import unicodedata
from collections.abc import Sequence

_ESCAPED = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "\n": " ",
    "\r": " ",
    "\N{NO-BREAK SPACE}": "~",
    "\N{MIDDLE DOT}": r"\textperiodcentered{}",
    "\N{GREEK CAPITAL LETTER DELTA}": r"$\Delta$",
    "\N{MINUS SIGN}": "$-$",
    "\N{PLUS-MINUS SIGN}": r"$\pm$",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "\N{EN DASH}": "--",
    "\N{HORIZONTAL ELLIPSIS}": r"\ldots{}",
    "\N{LEFT DOUBLE QUOTATION MARK}": "``",
    "\N{RIGHT DOUBLE QUOTATION MARK}": "''",
    "\N{RIGHT SINGLE QUOTATION MARK}": "'",
}
_COLUMN, _PAGE = 234.0, 504.0
"""Points of one column of 3.25 inches, and of both."""
_LETTER, _SMALL_LETTER, _BETWEEN = 4.5, 3.7, 6.0
"""Points of a letter in footnotesize and scriptsize, and between two columns, rather too many than too few."""
_LONGEST, _LONGEST_NARROW = 40, 22
"""Letters of a line of text in a table of both columns, and of one; longer texts are broken."""


def latex_text(text: str) -> str:
    """The text with everything escaped that LaTeX reads as a command."""
    return "".join(_ESCAPED.get(letter, letter) for letter in unicodedata.normalize("NFC", text))


def latex_table(
    name: str,
    caption: str,
    head: Sequence[Sequence[str]],
    body: Sequence[Sequence[str]],
    aligned: Sequence[str],
    *,
    one_column: bool,
    rules: int | None = None,
    notes: Sequence[str] = (),
) -> str:
    """A `table` as wide as one column of a page, or a `table*` of both, of cells that are LaTeX already.

    `aligned` is `l` or `r` for each column; a rule goes above the row `rules`. What is wider is scaled to fit. Text
    beyond Latin letters needs LuaLaTeX or XeLaTeX, which a comment says.
    """
    lines = [*head, *body]
    widths = [max((_width(line[place]) for line in lines), default=0.0) for place in range(len(aligned))]
    longest, room = (_LONGEST_NARROW, _COLUMN) if one_column else (_LONGEST, _PAGE)
    columns = [
        rf">{{\raggedright\arraybackslash}}p{{{longest * _LETTER:.0f}pt}}" if width > longest * _LETTER else letter
        for width, letter in zip(widths, aligned, strict=True)
    ]
    is_scaled = sum(min(width, longest * _LETTER) for width in widths) + _BETWEEN * len(widths) > room
    rows = [f"{' & '.join(row)} \\\\" for row in body]
    if rules is not None:
        rows.insert(rules, r"\midrule")
    tabular = [
        rf"\begin{{tabular}}{{@{{}}{''.join(columns)}@{{}}}}",
        r"\toprule",
        *(f"{' & '.join(row)} \\\\" for row in head),
        *([r"\midrule"] if head else []),
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    if is_scaled:
        tabular = [r"\resizebox{\linewidth}{!}{%", *tabular[:-1], r"\end{tabular}}"]
    packages = ["array", "booktabs", *(["graphicx"] if is_scaled else [])]
    comments = [f"% Made by `agiqa report`. Needs the packages {', '.join(packages)}."]
    if any(ord(letter) > 0xFF for cell in (caption, *(cell for line in lines for cell in line)) for letter in cell):
        comments.append("% Some of its letters need LuaLaTeX or XeLaTeX.")
    comments += [f"% {line}" for note in notes for line in note.splitlines()]
    kind = "table" if one_column else "table*"
    start = [rf"\begin{{{kind}}}[t]", r"\centering", rf"\caption{{{caption}}}", rf"\label{{tab:{name}}}"]
    size = [r"\footnotesize", r"\setlength{\tabcolsep}{3pt}"]
    return "\n".join([*comments, *start, *size, *tabular, rf"\end{{{kind}}}"]) + "\n"


def _width(cell: str) -> float:
    """Points that a cell takes, about."""
    small = sum(len(_printed(part)) for part in re.findall(r"\{\\scriptsize ([^}]*)\}", cell))
    return _SMALL_LETTER * small + _LETTER * (len(_printed(cell)) - small)


def _printed(cell: str) -> str:
    """What a reader sees of a cell, about: a command with its braces is one letter."""
    text = re.sub(r"\\(textbf|scriptsize)\b", "", cell)
    return re.sub(r"\\[a-zA-Z]+(\{\})?", "x", text).translate(str.maketrans("", "", "{}$\\"))
