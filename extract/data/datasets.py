"""Data sets: rows, conversations and images joined into items, with every problem reported at once."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from agiqa.errors import ConfigError, DataError
from agiqa.extract.data.conversations import Conversation, asked_otherwise, read_conversations
from agiqa.extract.data.image_names import ImageFinder, images_below, written_images
from agiqa.extract.data.images import CHECKERS, CheckedImage, checked_image, image_checks
from agiqa.extract.data.items import DataSet, Item, Message
from agiqa.extract.data.labels import Rows, read_rows, rows_of_images
from agiqa.extract.data.matching import Joined, Pair, join, join_aspects, row_name
from agiqa.extract.data.sources import Sources, find_sources
from agiqa.extract.data.templates import (
    aspects_of,
    ended,
    fill,
    prefixes_of,
    reads_description,
    reads_rating_word,
    template_of,
)
from agiqa.progress import say, track
from agiqa.store.format.columns import ColumnNames, open_labels
from agiqa.store.format.items import TEACHER, TEXT_AUTHOR, TEXT_AUTHORS, teacher_warning
from agiqa.store.format.labels import ASPECT_COLUMNS, MosRange, scale_of, scale_warning
from agiqa.store.format.names import NameIndex

_SCORED = ("val", "test")
"""The parts whose scores select or measure a head."""


def load_data_set(
    data: str | Path,
    *,
    conversations: Sequence[str] = (),
    labels: str | Path | None = None,
    variant: str = "id",
    aspect: str = "quality",
    images: bool,
    mos_range: MosRange | Literal["recorded"] | None = "recorded",
    on_bad_item: Literal["fail", "skip"] = "fail",
    columns: ColumnNames | None = None,
    prompt: str | None = None,
) -> DataSet:
    """Read and check a whole data set; with `images` every image is decoded once.

    `data` is a folder with data.csv (and images/) or with a Hugging Face metadata file, a table of any format of
    `agiqa.store.format.tables`, or an M3-AGIQA conversation file with the table of its MOS in `labels`. `columns` say
    which column means what, see `open_labels`. `conversations` are `[ASPECT:][SPLIT=]FILE`; a conversation belongs to
    the row whose `name` ends its `image` field, and rows without a conversation are left out and counted in `notes`. A
    variant with several aspects (see `aspects_of`) needs files on each, or the columns `description_ASPECT` in the
    table. `warnings` name val and test items that read a teacher's text, and a missing test part. MOS must lie within
    `mos_range` (lowest, highest), by default that of an import, see `scale_of`; None leaves them unread. Every row of a
    table with MOS must have one, but for the split test. With `images`, a name may differ from the file's in folder,
    case or extension. `prompt` is that of all images of a table without prompts, or of a folder without a table, whose
    images have no labels.

    Raises UnknownName for a variant, aspect or split; ConfigError for options that contradict each other;
    DataError for files that cannot be used at all, and for bad items, all listed in one error. With
    `on_bad_item="skip"` bad items are left out instead, unless no item would be left.
    """
    _refuse_empty(prompt)
    aspects = aspects_of(variant, aspect)
    sources = find_sources(Path(data), conversations, None if labels is None else Path(labels), aspect=aspect)
    scale = None
    if mos_range is not None and not sources.without_table:
        scale = scale_of(sources.table, None if mos_range == "recorded" else mos_range)
    embedded = written_images(sources.table) if images and not sources.without_table else {}
    finder = ImageFinder(sources.folders, embedded=embedded, reads=images)
    if sources.without_table:
        table = _only_images(sources, prompt)
    else:
        table = read_rows(sources.table, scale, aspect=aspect, columns=columns, prompt=prompt, finder=finder)
    finder.announce(sources.table)
    joined = _join(sources, table, aspects, variant)
    builder = _Builder(sources=sources, aspects=aspects, variant=variant, finder=finder if images else None)
    outcomes = _build(builder, joined.pairs) if images else [builder.build(pair) for pair in joined.pairs]
    items = tuple(outcome for outcome in outcomes if isinstance(outcome, Item))
    problems = (*joined.problems, *(outcome for outcome in outcomes if isinstance(outcome, str)))
    if problems and (on_bad_item == "fail" or not items):
        raise DataError.from_problems(str(data), problems)
    about_labels: tuple[str, ...] = ()
    if scale is not None and not sources.without_table:
        about_labels = _doubts(items, scale) if table.labelled else (_unlabelled(sources, table),)
    return DataSet(
        name=sources.name,
        items=items,
        skipped=problems,
        notes=(*joined.notes, *table.notes, *about_labels),
        warnings=tuple(_warnings(sources, items, variant=variant)),
        table=sources.table,
        mos_range=scale,
    )


def _refuse_empty(prompt: str | None) -> None:
    """Raise ConfigError for a prompt without words."""
    if prompt is not None and not prompt.strip():
        message = "The prompt is empty; give the text that the images were generated from."
        raise ConfigError(message)


def _only_images(sources: Sources, prompt: str | None) -> Rows:
    """The rows of a folder without a table. Raises ConfigError without a `prompt`."""
    names = next(names for folder in sources.folders if (names := images_below(folder)))
    rows = rows_of_images(sources.table, names, prompt)
    say(f"{sources.table}: no table; reading its {len(names)} images, named by their files, without labels")
    return rows


def _join(sources: Sources, table: Rows, aspects: Sequence[str], variant: str) -> Joined:
    """The rows with their conversations on all `aspects`."""
    found: dict[str, list[Conversation]] = {aspect: [] for aspect in aspects}
    for file in sources.conversations:
        found[file.aspect_among(aspects)].extend(read_conversations(file.path, file.split))
    if reads_description(variant) and not sources.conversations:
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
    finder: ImageFinder | None
    """None where no images are read."""
    check: Callable[[Path], CheckedImage] = checked_image
    """Decodes the image at a path."""

    def build(self, pair: Pair) -> Item | str:
        """The item of `pair`, or one line with item, file and the reasons why there is none."""
        row, conversation = pair
        problems = [*row.problems, *self._missing_words(pair)]
        image, checked = None, None
        if self.finder is not None and not row.problems:
            try:
                image = self.finder.image_of(row.name)
                checked = self.check(image)
            except DataError as error:
                problems.append(str(error))
        if problems:
            label = row.name if row.name.strip() else "a row without a name"
            return f"{label} ({self.sources.table.name}, line {row.number}): {'; '.join(problems)}"
        turns = self._messages(pair)
        return Item(
            name=row.name,
            prompt=row.prompt,
            conversation=turns,
            image=image,
            labels=dict(row.labels),
            deviations=dict(row.deviations),
            counts=dict(row.counts),
            split=conversation.split if conversation is not None and conversation.split is not None else row.split,
            generator=row.generator,
            description=turns[1].content if len(turns) > 1 else None,
            image_sha256=None if checked is None else checked.sha256,
            image_size=None if checked is None else checked.size,
            text_author=self._author(pair, self.variant),
            prefix_authors={name: self._author(pair, name) for name in prefixes_of(self.variant, self.aspects[0])},
        )

    def _author(self, pair: Pair, variant: str) -> str | None:
        """Who wrote the texts that the model reads of `pair` under `variant`."""
        row, conversation = pair
        if not reads_description(variant):
            return None
        return row.text_author if conversation is None else conversation.text_author(variant)

    def _missing_words(self, pair: Pair) -> list[str]:
        row, conversation = pair
        problems: list[str] = []
        lacking = [aspect for aspect in self.aspects if aspect not in row.descriptions]
        if reads_description(self.variant) and conversation is None and lacking:
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
            turns.append(Message(role="assistant", content=row.descriptions.get(aspect, "")))
        turns.append(Message(role="user", content=rated.rate))
        if reads_rating_word(self.variant):
            turns.append(Message(role="assistant", content=row.rating or ""))
        return tuple(ended(turns, self.variant))


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
    if not any(item.split == "test" for item in items) and not sources.without_table:
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
    images: Sequence[Path], *, prompt: str | None, table: Path | None, columns: ColumnNames | None = None
) -> tuple[list[Item], dict[str, str]]:
    """An item per image, named by its path, without conversation or labels; and why other images make none, by path.

    The prompts are those of `prompts_of_images`. A folder stands for all images below it. An image without a prompt or
    that cannot be read makes no item; one given twice makes one item. Raises as `prompts_of_images`, and DataError for
    a folder without images.
    """
    paths = list(dict.fromkeys(expanded(images)))
    texts = prompts_of_images(paths, prompt=prompt, table=table, columns=columns)
    found = items_of_pairs(list(zip(paths, texts, strict=True)), table=table)
    items = [one for one in found if isinstance(one, Item)]
    return items, {str(path): one for path, one in zip(paths, found, strict=True) if isinstance(one, str)}


def prompts_of_images(
    images: Sequence[Path], *, prompt: str | None, table: Path | None, columns: ColumnNames | None = None
) -> list[str]:
    """The prompt of each image; empty where there is none.

    Either all images have the `prompt`, or the `table` has the columns `prompt` and `name`, which ends an image's
    path. Raises ConfigError unless exactly one of both is given, and DataError for a table that cannot be read.
    """
    if (prompt is None) == (table is None):
        message = "Give either --prompt, the text of all images, or --prompts table.csv with the columns name, prompt."
        raise ConfigError(message)
    _refuse_empty(prompt)
    texts = {} if table is None else _read_prompts(table, columns)
    index = NameIndex(texts, other_extensions=True)
    found = [prompt or _prompt_of(image, texts, index) for image in images]
    if table is not None:
        index.announce(str(table))
    return found


def items_of_pairs(pairs: Sequence[tuple[Path, str]], *, table: Path | None = None) -> list[Item | str]:
    """An item for each image and its prompt, or why there is none. `table` has the prompts, for messages."""
    missing = "has no prompt" if table is None else f"{table} has no prompt under this name"
    found: list[Item | str] = []
    with image_checks() as check:
        for image, prompt in pairs:
            if not prompt.strip():
                found.append(f"{image}: {missing}")
                continue
            try:
                checked = check(image)
            except DataError as error:
                found.append(str(error))
                continue
            about: Any = {"image": image, "image_sha256": checked.sha256, "image_size": checked.size}
            found.append(Item(name=str(image), prompt=prompt, conversation=(), **about))
    return found


def expanded(images: Sequence[Path]) -> Iterator[Path]:
    """`images`, with all images below a folder in its place."""
    for image in images:
        if not image.is_dir():
            yield image
            continue
        names = images_below(image)
        if not names:
            message = f"{image}: a folder without images (looked for .png, .jpg, .webp, ... in it and below)."
            raise DataError(message)
        say(f"{image}: {len(names)} images")
        yield from (image / name for name in names)


def _prompt_of(image: Path, texts: Mapping[str, str], index: NameIndex) -> str:
    """The prompt under the name that ends the path of `image`, or else under one that differs in case or extension.

    Empty if there is none, or several.
    """
    name = row_name(image.as_posix(), texts)
    if name is None:
        with suppress(DataError):
            name = index.find(image.as_posix())
    return texts.get(name or "", "")


def _read_prompts(path: Path, columns: ColumnNames | None) -> dict[str, str]:
    """The prompts of a table by name; of two rows with one name, the first counts."""
    table = open_labels(path, columns)
    table.need("name")
    table.need("prompt")
    cells = [dict(zip(table.header, row.cells, strict=False)) for row in reversed(list(table.rows))]
    return {row.get("name", "").replace("\\", "/"): row.get("prompt", "") for row in cells}
