"""Rows and conversations matched by image name and prompt; what matches nothing is a problem with an address."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from agiqa.errors import DataError
from agiqa.extract.data.asked_prompts import Asked, prompt_faults
from agiqa.extract.data.conversations import Talk
from agiqa.extract.data.labels import Row
from agiqa.extract.data.sources import Sources

Pair = tuple[Row, Talk | None]


@dataclass(frozen=True, kw_only=True)
class Joined:
    """What belongs together, in the order of the table."""

    pairs: tuple[Pair, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]


def join(sources: Sources, rows: Sequence[Row], talks: Sequence[Talk]) -> Joined:
    """Pair each row with its conversation, or with None where there are no conversation files.

    Raises DataError when not a single conversation finds its row.
    """
    table = sources.table.name
    if not talks:
        first = _first_by_name(rows)
        alone: list[Pair] = [(row, None) for row in rows if not row.name or first[row.name] is row]
        return Joined(pairs=tuple(alone), problems=tuple(_repeats(table, rows, first)), notes=())
    first = _first_by_name(rows)
    chosen, problems = _choose(sources, rows, first, talks)
    named = {name for talk in talks if (name := row_name(talk.image, first)) is not None}
    problems.extend(_repeats(table, [row for row in rows if row.name in named], first))
    pairs: list[Pair] = [(first[name], talk) for name, talk in chosen.items()]
    pairs.sort(key=lambda pair: pair[0].number)
    left = sum(row.name not in named for row in rows)
    notes = (f"{left} of {len(rows)} rows of {table} are left out: no conversation names them.",) if left else ()
    return Joined(pairs=tuple(pairs), problems=tuple(problems), notes=notes)


def join_aspects(sources: Sources, rows: Sequence[Row], talks: Mapping[str, Sequence[Talk]]) -> Joined:
    """Pair each row with its conversations on several aspects, as the first one's with the others in `more`.

    `talks` are those of each aspect, in the order of the conversation. A row that has some aspects and lacks others
    is a problem; the notes count them by aspect. Raises DataError when not a single conversation on some aspect finds
    its row, or there are none.
    """
    table = sources.table.name
    first = _first_by_name(rows)
    problems: list[str] = []
    chosen: dict[str, dict[str, Talk]] = {}
    for aspect, spoken in talks.items():
        if not spoken:
            message = f"No descriptions of {aspect}; give their file: --conversations {aspect}:FILE."
            raise DataError(message)
        chosen[aspect], faults = _choose(sources, rows, first, spoken)
        problems.extend(f"{aspect}: {fault}" for fault in faults)
    named = sorted({name for found in chosen.values() for name in found}, key=lambda name: first[name].number)
    problems.extend(_repeats(table, [row for row in rows if row.name in set(named)], first))
    pairs: list[Pair] = []
    for name in named:
        told = [found[name] for found in chosen.values() if name in found]
        lacking = [aspect for aspect, found in chosen.items() if name not in found]
        splits = {talk.split for talk in told if talk.split is not None}
        if lacking or len(splits) > 1:
            fault = (
                f"no description of {' and '.join(lacking)}" if lacking else f"in the splits {sorted(splits)} at once"
            )
            problems.append(f"{name} ({table}, line {first[name].number}): {fault} ({told[0].where} has it)")
        else:
            pairs.append((first[name], replace(told[0], more=tuple(told[1:]), split=next(iter(splits), None))))
    return Joined(pairs=tuple(pairs), problems=tuple(problems), notes=tuple(_counts(table, rows, named, chosen)))


def _counts(
    table: str, rows: Sequence[Row], named: Sequence[str], chosen: Mapping[str, Mapping[str, Talk]]
) -> Iterator[str]:
    left = sum(row.name not in set(named) for row in rows)
    if left:
        yield f"{left} of {len(rows)} rows of {table} are left out: no conversation names them."
    for aspect, found in chosen.items():
        if len(found) < len(named):
            yield f"{len(named) - len(found)} of {len(named)} images have no description of {aspect}."


def row_name(image: str, rows: Mapping[str, object]) -> str | None:
    """The row that `image` (a path such as data/set/images/0.png) ends in: its longest known tail."""
    parts = image.replace("\\", "/").split("/")
    tails = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((tail for tail in tails if tail in rows), None)


def _first_by_name(rows: Sequence[Row]) -> dict[str, Row]:
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row.name, row)
    return first


def _repeats(table: str, rows: Sequence[Row], first: Mapping[str, Row]) -> Iterator[str]:
    for row in rows:
        if row.name and first[row.name] is not row:
            yield f"{row.name} ({table}, line {row.number}): duplicate of line {first[row.name].number}"


def _choose(
    sources: Sources, rows: Sequence[Row], first: Mapping[str, Row], talks: Sequence[Talk]
) -> tuple[dict[str, Talk], list[str]]:
    """The conversation of each row name, and the conversations that cannot be used; `first` is the row of a name.

    Raises DataError when not a single conversation finds its row.
    """
    table, named, problems = sources.table.name, dict[str, Talk](), list[str]()
    for talk in talks:
        name = row_name(talk.image, first)
        if talk.problems:
            problems.append(f"{talk.where}: {'; '.join(talk.problems)}")
        elif name is None:
            problems.append(f"{talk.where}: no row of {table} is named like its image {talk.image!r}")
        elif name in named:
            problems.append(f"{talk.where}: the image {name} has a conversation already ({named[name].where})")
        else:
            named[name] = talk
    if not named and not any(talk.problems for talk in talks):
        _refuse_strangers(sources, rows, talks)
    asked = {
        name: Asked(first[name].prompt, f"{table}, line {first[name].number}", talk) for name, talk in named.items()
    }
    strangers = prompt_faults(asked, (row.prompt for row in rows))
    return {name: talk for name, talk in named.items() if name not in strangers}, [*problems, *strangers.values()]


def _refuse_strangers(sources: Sources, rows: Sequence[Row], talks: Sequence[Talk]) -> None:
    files = ", ".join(str(file.path) for file in sources.conversations)
    message = (
        f"{files} and {sources.table} have no image in common: the conversations speak of {talks[0].image!r}, "
        f"the table of {rows[0].name!r}. Is it the table of another data set?"
    )
    raise DataError(message)
