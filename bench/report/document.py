"""The same as the page in one markdown file, without pictures: for a repository, an issue or a manuscript."""

from collections.abc import Iterable

from agiqa.bench.report.examples import Examples
from agiqa.bench.report.figures import Picture
from agiqa.bench.report.sections import Content, Section
from agiqa.bench.report.tables import plain


def document(title: str, content: Content) -> str:
    """The findings, what they can and cannot show, and every section that has words or tables."""
    parts = [f"# {plain(title)}", _listed(f"{name}: {value}" for name, value in content.facts.items())]
    for heading, sentences in (
        ("In short", content.findings),
        ("What these numbers can and cannot show", content.notes),
    ):
        if sentences:
            parts += [f"## {heading}", _listed(sentences)]
    parts += [part for section in content.sections for part in _section(section)]
    if content.problems:
        parts += ["## What is left out", _listed(content.problems)]
    return "\n\n".join([*parts, "Made by `agiqa report`."]) + "\n"


def _section(section: Section) -> list[str]:
    """Its heading, words and tables; nothing where it has pictures alone."""
    tables = [
        (block.table() if isinstance(block, Examples) else block).markdown().rstrip("\n")
        for block in section.blocks
        if not isinstance(block, Picture)
    ]
    words = [_listed(section.words)] if section.words else []
    return [f"## {plain(section.title)}", *words, *tables] if words or tables else []


def _listed(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {plain(sentence)}" for sentence in sentences)
