"""What spoils a training though nothing is broken, told before a model runs: texts that tell the MOS, no test part."""

from collections import Counter
from collections.abc import Iterator, Sequence

from agiqa.extract.data.items import Item
from agiqa.extract.data.sources import Sources
from agiqa.store.format.items import TEACHER, TEXT_AUTHOR, TEXT_AUTHORS, teacher_warning

_SCORED = ("val", "test")
"""The parts whose scores choose or measure a head."""


def cautions(sources: Sources, items: Sequence[Item], *, variant: str) -> Iterator[str]:
    """A line for each of them in the data set of these files and items."""
    for part in _SCORED:
        authors = [item.text_author for item in items if item.split == part]
        if count := authors.count(TEACHER):
            yield teacher_warning(part, count, len(authors), rating_words=variant == "full")
        if variant == "full" and (count := authors.count(None)):
            yield (
                f"{sources.table} does not say who wrote the rating words that {count} of {len(authors)} {part} items "
                f"read. If a teacher did that was told the MOS, scores are too high: name the author in a column "
                f"`{TEXT_AUTHOR}` ({', '.join(TEXT_AUTHORS)})"
            )
    if not any(item.split == "test" for item in items):
        yield _without_test_part(sources, items)


def _without_test_part(sources: Sources, items: Sequence[Item]) -> str:
    counts = Counter(item.split or "none" for item in items)
    told = ", ".join(f"{split} ({count})" for split, count in counts.items())
    found = f"no item is in the split test, which `agiqa train` tests on by default; the splits are: {told}"
    files = [file for file in sources.conversations if file.split in ("val", None)]
    if not files:
        return f"{found}. Give {sources.table} a column `split`, or train with `--split grouped`"
    options = " or ".join(
        f"--conversations {'' if file.aspect is None else f'{file.aspect}:'}test={file.path}" for file in files
    )
    return f"{found}. Where a file is the part to test on, say so: {options}. Or train with `--split grouped`"
