"""Sphinx builds the site of these pages: `make docs`. Warnings are errors."""

import posixpath
import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from agiqa import __version__  # noqa: E402  # the path is set above

project = "agiqa"
author = "The agiqa authors"
copyright = f"2026, {author}"  # noqa: A001  # the name is Sphinx's
release = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx_click"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "agiqa"
html_static_path = ["static"]
html_css_files = ["agiqa.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 4
suppress_warnings = ["ref.python"]  # a type `bytes` in a signature is no attribute of that name

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_execution_in_temp = True
nb_execution_show_tb = True
nb_output_stderr = "remove"  # progress

default_role = "code"  # docstrings mark names by single backquotes, as Markdown does
autodoc_member_order = "groupwise"
autodoc_default_options = {"members": True, "exclude-members": "model_config"}
maximum_signature_line_length = 88

FILES = {
    "ARCHITECTURE.md": "project/architecture.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "README.md": "index.md",
    "bench/LOG.md": "project/log.md",
    "bench/RESULTS.md": "project/results.md",
    "extract/FAMILIES.md": "reference/families.md",
    "store/FORMAT.md": "reference/format.md",
}
"""Files of the repository outside docs/, and the pages that include them."""


def to_pages(text: str, file: str, page: str) -> str:
    """The Markdown `text` of `file`, for `page`: links to files of the repository lead to the pages that show them.

    Paths of files are relative to the root of the repository, those of pages to docs/.
    """

    def replaced(match: re.Match[str]) -> str:
        target, anchor = match.group(1), match.group(2) or ""
        found = posixpath.normpath(posixpath.join(posixpath.dirname(file), target))
        shown = FILES.get(found) or (found.removeprefix("docs/") if found.startswith("docs/") else None)
        if shown is None:
            return match.group()
        return f"]({posixpath.relpath(shown, posixpath.dirname(page) or '.')}{anchor})"

    return re.sub(r"\]\(([^)#:\s]+\.md)(#[^)\s]*)?\)", replaced, text)


def setup(app: Sphinx) -> None:
    """Rewrite the links of pages and of the files that they include."""

    def source_read(_app: Sphinx, docname: str, content: list[str]) -> None:
        content[0] = to_pages(content[0], f"docs/{docname}.md", f"{docname}.md")

    def include_read(_app: Sphinx, path: Path, _parent: str, content: list[str]) -> None:
        file = posixpath.normpath(f"docs/{path.as_posix()}")
        content[0] = to_pages(content[0], file, FILES[file])

    def without_text(_app: Sphinx, what: str, _name: str, _object: object, _options: object, lines: list[str]) -> None:
        if what == "module":  # the page says it in its own words
            lines.clear()

    app.connect("autodoc-process-docstring", without_text)
    app.connect("source-read", source_read)
    app.connect("include-read", include_read)
