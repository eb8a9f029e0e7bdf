"""What notebooks show: results as small tables, and the progress of a training as a bar below its cell."""

import html
import sys
from collections.abc import Mapping, Sequence
from typing import Any


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    ipython: Any = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and hasattr(shell, "kernel")


def html_table(title: str, rows: Mapping[str, object]) -> str:
    """A title and a table of names and values, for `_repr_html_`."""
    cells = "".join(
        f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
        f"<td style='text-align:left'>{html.escape(str(value))}</td></tr>"
        for name, value in rows.items()
    )
    return f"<div><b>{html.escape(title)}</b><table>{cells}</table></div>"


def one_line(title: str, rows: Mapping[str, object]) -> str:
    """`<title: name value, name value>`, for `__repr__`."""
    return f"<{title}: {', '.join(f'{name} {value}' for name, value in rows.items())}>"


class CellBar:
    """A progress bar below the cell of a notebook, with lines of text above it."""

    def __init__(self) -> None:
        """An empty bar."""
        from IPython.display import HTML, display

        self._lines = list[str]()
        self._bar = ""
        self._html: Any = HTML
        show: Any = display
        self._handle: Any = show(self._html(""), display_id=True)

    def show(self, done: float, total: float | None, text: str) -> None:
        """Show `done` of `total` (None: unknown), and a text behind the bar."""
        ends = "" if total is None else f" value='{done:g}' max='{max(1.0, total):g}'"
        self._bar = f"<progress{ends} style='width:20em'></progress> {html.escape(text)}"
        self._update()

    def clear(self) -> None:
        """Take the bar away; the lines stay."""
        self._bar = ""
        self._update()

    def line(self, text: str) -> None:
        """Show a line above the bar."""
        self._lines.append(text)
        self._update()

    def _update(self) -> None:
        self._handle.update(self._html(f"{_paragraph(self._lines)}{self._bar}"))


def _paragraph(lines: Sequence[str]) -> str:
    return f"<pre>{html.escape(chr(10).join(lines))}</pre>" if lines else ""
