"""Data sets: rows, conversations and images joined into items, with every problem reported at once."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from agiqa.errors import ConfigError, DataError
from agiqa.extract.data.conversations import (
    Conversation,
    ConversationFile,
    asked_otherwise,
    parse_source,
    read_conversations,
)
from agiqa.extract.data.images import CHECKERS, CheckedImage, checked_image, image_checks
from agiqa.extract.data.items import DataSet, Item, Message
from agiqa.extract.data.labels import Rows, read_rows
from agiqa.extract.data.matching import Joined, Pair, join, join_aspects, row_name
from agiqa.extract.data.templates import aspects_of, fill, reads_rating_word, template_of
from agiqa.progress import track
from agiqa.store.format.items import TEACHER, TEXT_AUTHOR, TEXT_AUTHORS, teacher_warning
from agiqa.store.format.labels import ASPECT_COLUMNS, DEFAULT_RANGE, MosRange, check_range, read_table, scale_warning

CONVERSATION_SUFFIXES = (".json", ".jsonl")
_SCORED = ("val", "test")
"""The parts whose scores select or measure a head."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The files of one data set."""

    name: str
    table: Path
    conversations: tuple[ConversationFile, ...]
    folders: tuple[Path, ...]
    """Folders to look for images in, in this order."""

    def image_of(self, name: str) -> Path:
        """The file called `name` in the first folder that has it. Raises DataError when none has."""
        found = next((path for folder in self.folders if (path := folder / name).is_file()), None)
        if found is None:
            message = f"no image of that name in {' or '.join(str(folder) for folder in self.folders)}"
            raise DataError(message)
        return found


def find_sources(
    data: Path, conversations: Sequence[str], labels: Path | None, *, aspect: str | None = None
) -> Sources:
    """The files of `data`: a folder with data.csv, a csv file, or a conversation file whose labels are `labels`.

    `conversations` are further files, see `parse_source`; a conversation file `data` describes `aspect`. Raises
    DataError when a file is missing, and ConfigError when `labels` is missing or belongs to no conversation file.
    """
    files = [parse_source(source) for source in conversations]
    name = data.resolve().name if data.is_dir() else data.stem
    if data.suffix.lower() in CONVERSATION_SUFFIXES and not data.is_dir():
        if labels is None:
            message = f"{data} holds conversations; name the table with their MOS too: --labels data.csv."
            raise ConfigError(message)
        files.insert(0, replace(parse_source(str(data)), aspect=aspect))
        table = labels
    elif labels is not None:
        message = f"--labels goes with a conversation file; {data} has its own labels."
        raise ConfigError(message)
    else:
        table = data / "data.csv" if data.is_dir() else data
    for path in (table, *(file.path for file in files)):
        if not path.is_file():
            inside = f" (looked for data.csv in the folder {data})" if data.is_dir() and path == table else ""
            message = f"{path}: no such file{inside}."
            raise DataError(message)
    if table.suffix.lower() != ".csv":
        message = f"{table}: expected a folder with data.csv, a .csv file, or a .json or .jsonl conversation file."
        raise DataError(message)
    bases = dict.fromkeys([table.parent, data if data.is_dir() else data.parent])
    folders = tuple(folder for base in bases for folder in (base / "images", base))
    return Sources(name=name, table=table, conversations=tuple(files), folders=folders)


def load_data_set(
    data: Path,
    *,
    conversations: Sequence[str] = (),
    labels: Path | None = None,
    variant: str = "id",
    aspect: str = "quality",
    images: bool,
    mos_range: MosRange | None = DEFAULT_RANGE,
    on_bad_item: Literal["fail", "skip"] = "fail",
) -> DataSet:
    """Read and check a whole data set; with `images` every image is decoded once.

    `data` is a folder with data.csv (and images/), a csv file, or an M3-AGIQA conversation file with the csv of its
    MOS in `labels`. `conversations` are `[ASPECT:][SPLIT=]FILE`; a conversation belongs to the row whose `name` ends
    its `image` field, and rows without a conversation are left out and counted in `notes`. A variant with several
    aspects (see `aspects_of`) needs files on each, or the columns `description_ASPECT` in the csv. `warnings` name
    val and test items that read a teacher's text, and a missing test part. MOS must lie within `mos_range` (lowest,
    highest), and every row of a csv with a column of them must have one; None leaves them unread.

    Raises UnknownName for a variant, aspect or split; ConfigError for options that contradict each other;
    DataError for files that cannot be used at all, and for bad items, all listed in one error. With
    `on_bad_item="skip"` bad items are left out instead, unless no item would be left.
    """
    aspects = aspects_of(variant, aspect)
    scale = None if mos_range is None else check_range(mos_range)
    sources = find_sources(data, conversations, labels, aspect=aspect)
    table = read_rows(sources.table, mos_range, aspect=aspect)
    joined = _join(sources, table, aspects, variant)
    builder = _Builder(sources=sources, aspects=aspects, variant=variant, images=images)
    outcomes = _build(builder, joined.pairs) if images else [builder.build(pair) for pair in joined.pairs]
    items = tuple(outcome for outcome in outcomes if isinstance(outcome, Item))
    problems = (*joined.problems, *(outcome for outcome in outcomes if isinstance(outcome, str)))
    if problems and (on_bad_item == "fail" or not items):
        raise DataError.from_problems(str(data), problems)
    about_labels = () if scale is None else _doubts(items, scale) if table.labelled else (_unlabelled(sources, table),)
    return DataSet(
        name=sources.name,
        items=items,
        skipped=problems,
        notes=(*joined.notes, *about_labels),
        warnings=tuple(_warnings(sources, items, variant=variant)),
        table=sources.table,
        mos_range=scale,
    )


def _join(sources: Sources, table: Rows, aspects: Sequence[str], variant: str) -> Joined:
    """The rows with their conversations on all `aspects`."""
    found: dict[str, list[Conversation]] = {aspect: [] for aspect in aspects}
    for file in sources.conversations:
        found[file.aspect_among(aspects)].extend(read_conversations(file.path, file.split))
    if variant != "no_id" and not sources.conversations:
        _check_descriptions(sources, table, aspects, variant)
    if len(aspects) > 1 and sources.conversations:
        joined = join_aspects(sources.table, table.rows, found)
    else:
        joined = join(sources.table, table.rows, found[aspects[0]])
    return joined if variant == "no_id" else replace(joined, notes=(*joined.notes, *_other_questions(found)))


def _other_questions(found: Mapping[str, Sequence[Conversation]]) -> Iterator[str]:
    """A warning for each aspect whose conversations ask about another one."""
    for aspect, conversations in found.items():
        for other, count in asked_otherwise(conversations, aspect).items():
            files = ", ".join(dict.fromkeys(one.file.name for one in conversations))
            yield (
                f"warning: {count} of {len(conversations)} conversations in {files} ask about {other}, and you gave "
                f"them for {aspect}. Give the file of {aspect}{f', or --aspect {other}' if len(found) == 1 else ''}."
            )


def _check_descriptions(sources: Sources, table: Rows, aspects: Sequence[str], variant: str) -> None:
    """Raise DataError when no row at all describes one of `aspects`."""
    for aspect in aspects:
        if not any(aspect in row.descriptions for row in table.rows):
            which, column = ("", "description") if len(aspects) == 1 else (f" of {aspect}", f"description_{aspect}")
            message = (
                f"{sources.table}: the variant {variant!r} needs descriptions{which}, and there are none; "
                f"give --conversations or use --variant no_id. A column {column!r} would do too."
            )
            raise DataError(message)


@dataclass(frozen=True, kw_only=True)
class _Builder:
    """Builds the items of one data set under one conversation variant."""

    sources: Sources
    aspects: Sequence[str]
    """Aspects that the conversation describes; the first is rated."""
    variant: str
    images: bool
    check: Callable[[Path], CheckedImage] = checked_image
    """Decodes the image at a path."""

    def build(self, pair: Pair) -> Item | str:
        """The item of `pair`, or one line with item, file and the reasons why there is none."""
        row, conversation = pair
        problems = [*row.problems, *self._missing_words(pair)]
        image, checked = None, None
        if self.images and not row.problems:
            try:
                image = self.sources.image_of(row.name)
                checked = self.check(image)
            except DataError as error:
                problems.append(str(error))
        if problems:
            label = row.name if row.name.strip() else "a row without a name"
            return f"{label} ({self.sources.table.name}, line {row.number}): {'; '.join(problems)}"
        turns, author = self._messages(pair), None
        if self.variant != "no_id":
            author = row.text_author if conversation is None else conversation.text_author(self.variant)
        return Item(
            name=row.name,
            prompt=row.prompt,
            conversation=turns,
            image=image,
            labels=dict(row.labels),
            split=conversation.split if conversation is not None and conversation.split is not None else row.split,
            generator=row.generator,
            description=turns[1].content if len(turns) > 1 else None,
            image_sha256=None if checked is None else checked.sha256,
            image_size=None if checked is None else checked.size,
            text_author=author,
        )

    def _missing_words(self, pair: Pair) -> list[str]:
        row, conversation = pair
        problems: list[str] = []
        lacking = [aspect for aspect in self.aspects if aspect not in row.descriptions]
        if self.variant != "no_id" and conversation is None and lacking:
            which = f" of {' and '.join(lacking)}" if len(self.aspects) > 1 else ""
            problems.append(f"no description{which}; give --conversations or use --variant no_id")
        if reads_rating_word(self.variant) and (row.rating if conversation is None else conversation.rating) is None:
            problems.append("no rating word, which the variant full needs; use --variant id")
        if conversation is not None and conversation.split and row.split and conversation.split != row.split:
            problems.append(f"in split {row.split} by the table but {conversation.split} by {conversation.where}")
        return problems

    def _messages(self, pair: Pair) -> tuple[Message, ...]:
        row, conversation = pair
        rated = template_of(self.aspects[0])
        if self.variant == "no_id":
            return (Message(role="user", content=fill(rated.one_round, row.prompt)),)
        if conversation is not None:
            return conversation.messages(self.variant)
        turns: list[Message] = []
        for aspect in self.aspects:
            turns.append(Message(role="user", content=fill(template_of(aspect).describe, row.prompt)))
            turns.append(Message(role="assistant", content=row.descriptions[aspect]))
        turns.append(Message(role="user", content=rated.rate))
        if reads_rating_word(self.variant):
            turns.append(Message(role="assistant", content=row.rating or ""))
        return tuple(turns)


def _build(builder: _Builder, pairs: Sequence[Pair]) -> list[Item | str]:
    """The items of all pairs, their images decoded in other processes."""
    outcomes: list[Item | str] = []
    with (
        ThreadPoolExecutor(CHECKERS) as pool,
        image_checks() as check,
        track("check", len(pairs), "images") as advance,
    ):
        for outcome in pool.map(replace(builder, check=check).build, pairs):
            outcomes.append(outcome)
            advance(1)
    return outcomes


def _doubts(items: Sequence[Item], scale: MosRange) -> tuple[str, ...]:
    """A note for each aspect whose MOS look like those of a smaller scale."""
    aspects = sorted({aspect for item in items for aspect in item.labels})
    values = {aspect: np.array([item.labels.get(aspect, np.nan) for item in items]) for aspect in aspects}
    return tuple(note for aspect in aspects if (note := scale_warning(aspect, values[aspect], scale)))


def _unlabelled(sources: Sources, table: Rows) -> str:
    return (
        f"note: {sources.table} has no MOS column (found: {', '.join(table.header)}), so its items have no labels; "
        f"MOS columns are {', '.join(ASPECT_COLUMNS)}, and `agiqa store labels STORE TABLE` joins them later."
    )


def _warnings(sources: Sources, items: Sequence[Item], *, variant: str) -> Iterator[str]:
    """A line about texts from which heads could read the MOS, and one about a missing test part."""
    for part in _SCORED:
        authors = [item.text_author for item in items if item.split == part]
        if count := authors.count(TEACHER):
            yield teacher_warning(part, count, len(authors), rating_words=reads_rating_word(variant))
        if reads_rating_word(variant) and (count := authors.count(None)):
            yield (
                f"{sources.table} does not say who wrote the rating words that {count} of {len(authors)} {part} items "
                f"read. If a teacher that knew the MOS wrote them, scores are too high: name the author in a column "
                f"`{TEXT_AUTHOR}` ({', '.join(TEXT_AUTHORS)})"
            )
    if not any(item.split == "test" for item in items):
        yield _without_test_part(sources, items)


def _without_test_part(sources: Sources, items: Sequence[Item]) -> str:
    counts = Counter(item.split or "none" for item in items)
    splits = ", ".join(f"{split} ({count})" for split, count in counts.items())
    found = f"no item is in the split test, which `agiqa train` tests on by default; the splits are: {splits}"
    files = [file for file in sources.conversations if file.split in ("val", None)]
    if not files:
        return f"{found}. Give {sources.table} a column `split`, or train with `--split grouped`"
    options = " or ".join(
        f"--conversations {'' if file.aspect is None else f'{file.aspect}:'}test={file.path}" for file in files
    )
    return f"{found}. If one of the files is the part to test on, say so: {options}. Or train with `--split grouped`"


def items_of_images(
    images: Sequence[Path], *, prompt: str | None, table: Path | None
) -> tuple[list[Item], dict[str, str]]:
    """An item per image, named by its path, without conversation or labels; and why other images make none, by path.

    Either all images have the `prompt`, or the csv `table` has the columns `prompt` and `name`, which ends an image's
    path. An image without a prompt or that cannot be read makes no item; one given twice makes one item. Raises
    ConfigError unless exactly one of `prompt` and `table` is given, and DataError for a table that cannot be read.
    """
    if (prompt is None) == (table is None):
        message = "Give either --prompt, the text of all images, or --prompts table.csv with the columns name, prompt."
        raise ConfigError(message)
    if prompt is not None and not prompt.strip():
        message = "The prompt is empty; give the text that the images were generated from."
        raise ConfigError(message)
    texts = {} if table is None else _read_prompts(table)
    items: list[Item] = []
    problems: dict[str, str] = {}
    with image_checks() as check:
        for image in dict.fromkeys(images):
            text = prompt or texts.get(row_name(image.as_posix(), texts) or "", "")
            if not text.strip():
                problems[str(image)] = f"{image}: {table} has no prompt under this name"
                continue
            try:
                checked = check(image)
            except DataError as error:
                problems[str(image)] = str(error)
                continue
            about: Any = {"image": image, "image_sha256": checked.sha256, "image_size": checked.size}
            items.append(Item(name=str(image), prompt=text, conversation=(), **about))
    return items, problems


def _read_prompts(path: Path) -> dict[str, str]:
    """The prompts of a table by name; of two rows with one name, the first counts."""
    header, rows = read_table(path)
    for column in ("name", "prompt"):
        if column not in header:
            message = f"{path}: no column {column!r} (found: {', '.join(header)})."
            raise DataError(message)
    cells = [dict(zip(header, row.cells, strict=False)) for row in reversed(rows)]
    return {row["name"]: row.get("prompt", "") for row in cells}
