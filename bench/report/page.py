"""The page: one HTML file that holds its styles, its script, its pictures and its data, and asks no network."""

import base64
from importlib import resources

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from agiqa.bench.report.sections import Content
from agiqa.bench.report.tables import Table
from agiqa.version import agiqa_version

_TEMPLATE, _STYLE, _SCRIPT = "page.html.j2", "page.css", "page.js"
_HIGHEST = 5.0
"""The best MOS, at the right end of an item's scale."""


def render(title: str, content: Content) -> str:
    """The page. All text of the results is escaped; the style and script beside this module, and SVG, are not."""
    files = {
        name: (resources.files("agiqa.bench.report") / name).read_text(encoding="utf-8")
        for name in (_TEMPLATE, _STYLE, _SCRIPT)
    }
    environment = Environment(loader=DictLoader(files), autoescape=True, undefined=StrictUndefined)
    return environment.get_template(_TEMPLATE).render(
        title=title,
        content=content,
        css=Markup(files[_STYLE]),
        js=Markup(files[_SCRIPT]),
        version=agiqa_version(),
        csv_uri=_csv_uri,
        code=_code,
        signed=_signed,
        place=lambda value: 100.0 * min(1.0, max(0.0, value / _HIGHEST)),
    )


def _signed(value: float) -> str:
    """Two digits and a sign, but for what rounds to nothing."""
    text = f"{value:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text.replace("-", "\N{MINUS SIGN}")


def _code(text: str) -> Markup:
    """The text, with what stands between backticks as code."""
    parts = text.split("`")
    return Markup("").join(Markup("<code>{}</code>").format(part) if k % 2 else part for k, part in enumerate(parts))


def _csv_uri(table: Table) -> str:
    """The table's CSV as a link that saves it."""
    return f"data:text/csv;charset=utf-8;base64,{base64.b64encode(table.csv().encode()).decode()}"
