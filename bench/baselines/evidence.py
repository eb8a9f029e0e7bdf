"""What baselines read from the items of a store: columns, the model's rating words, and mean feature rows."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from agiqa.errors import DataError, ViewRefused
from agiqa.extract.data.conversations import Conversation, aspects_in_name, read_conversations
from agiqa.extract.data.matching import Match, prompt_faults, row_name
from agiqa.extract.describing.describing import images_without_answer
from agiqa.heads.closed.words import expected_mos, word_notes
from agiqa.heads.data.features import (
    FeatureSource,
    ItemRows,
    content_of,
    items_identity,
    location_of,
    read_checked,
)
from agiqa.heads.data.layers import JOINER, LAST, base_of, layer_of, pooled_rows
from agiqa.heads.data.prompt_groups import normalise_prompt, prompt_groups
from agiqa.heads.evaluation.rating_words import parse_rating_word
from agiqa.store import TOKEN_ROLES
from agiqa.store.disk.files import canonical_json
from agiqa.store.format.items import MODEL, TEACHER
from agiqa.store.format.labels import RATING_WORDS, MosRange

Array = NDArray[np.float64]
Positions = NDArray[np.int64]

_COLUMNS = ("descriptions", "generators", "text_authors")
"""Of the item table, beside names, prompts and labels."""
ALL, ANSWER = "all", "answer"
"""The tokens that are averaged into a feature row: all tokens, or those of the answer."""


class RatingWords:
    """The class of each item's rating word, 0 (bad) to 4 (excellent), from conversation files."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Read M3-AGIQA conversation files, as written by `agiqa describe`.

        A file whose name holds one aspect (`quality_test_res.json`) is about that aspect, any other about all aspects.
        Raises DataError for an unreadable file, or an unusable conversation in it.
        """
        self._files = [
            (_aspect_of(path), images_without_answer(path), read_conversations(path, None)) for path in files
        ]
        self.digest = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)).hexdigest()
        """Of the bytes of the files."""
        talks = [talk for _, _, talks in self._files for talk in talks]
        problems = [f"{talk.where}: {'; '.join(talk.problems)}" for talk in talks if talk.problems]
        if problems:
            where = "the conversations with rating words"
            raise DataError.from_problems(where, problems)

    def of(self, prompts: Mapping[str, str], label: str) -> dict[str, int | None]:
        """The class of each item's word on the aspect `label`, by name; None for an answer without a clear word.

        `prompts` maps the names of the items to their prompts. Raises DataError if the model itself wrote no word for
        an item (the teacher knew the MOS), or if the word is about another prompt.
        """
        if not self._files:
            message = "no files with rating words were given"
            raise DataError(message)
        found = self._own(prompts, label)
        lacking = [name for name in prompts if name not in found]
        if lacking:
            message = (
                f"{len(lacking)} of the {len(prompts)} items of a test part, {lacking[0]!r} first, have no rating word "
                f"by the model itself on {label}; the teacher knew the MOS when it wrote its words"
            )
            raise DataError(message)
        asked = {name: Match(prompts[name], "the store", talk) for name, talk in found.items()}
        faults = prompt_faults(asked, prompts.values())
        if faults:
            where = "the conversations with rating words"
            raise DataError.from_problems(where, list(faults.values()))
        return {name: _class_of(talk) for name, talk in found.items()}

    def _own(self, names: Mapping[str, object], label: str) -> dict[str, Conversation]:
        """By item, the conversations that the model itself answered, empty answers included."""
        found: dict[str, Conversation] = {}
        for aspect, silent, talks in self._files:
            for talk in talks if aspect in (None, label) else ():
                name = row_name(talk.image, names)
                if name is None or not (talk.rating_author == MODEL or talk.image in silent):
                    continue
                if name in found:
                    message = f"{talk.where}: the item {name!r} already has a rating word by the model itself"
                    raise DataError(message)
                found[name] = talk
        return found


def _class_of(talk: Conversation) -> int | None:
    word = parse_rating_word(talk.rating) if talk.rating_author == MODEL and talk.rating else None
    return None if word is None else RATING_WORDS.index(word)


def _aspect_of(path: Path) -> str | None:
    """The aspect that the file's name holds; None if it holds none, or several."""
    named = aspects_in_name(path)
    return named.pop() if len(named) == 1 else None


class MeanFeatures:
    """The feature rows that represent an item: the mean over all tokens and over the answer's tokens, or pooled rows.

    Each item is read once, until `forget`.
    """

    def __init__(self, source: FeatureSource) -> None:
        """Nothing is read yet. An item takes up to 16 bytes per channel, or 4 for each of its pooled rows."""
        self.source = source
        self._pooled = pooled_rows(source)
        self._rows: dict[int, dict[str, NDArray[np.floating]]] = {}
        """By item and kind of tokens; only items that have tokens of an answer have a row of these."""
        self._has_others: set[int] = set()
        """The items with tokens that are not of an answer."""

    @property
    def reads(self) -> str:
        """The kind of features in words."""
        names = {"hidden": "hidden states", "int8": "hidden states in int8"}
        kind, layer = names.get(self.source.encoding, f"{self.source.encoding} of rank {self.source.width}"), self.layer
        return kind if layer == LAST else f"{kind} of layer{'s' * (JOINER in layer)} {layer}"

    @property
    def layer(self) -> str:
        """The layer, or the layers joined, that are read."""
        return layer_of(self.source)

    def forget(self) -> None:
        """Free the rows; they are read again when they are asked for."""
        self._rows.clear()
        self._has_others.clear()

    def refuse_logits(self) -> None:
        """Raise DataError if the rows are raw logits."""
        if self.source.encoding == "logits":
            message = (
                f"agiqa fits no regression on the {self.source.width} raw logits of {location_of(self.source)}; "
                "make a sketch with `agiqa store sketch`"
            )
            raise DataError(message)

    def of(self, items: Positions) -> dict[str, Array]:
        """Rows (items, width) float64, under ALL and, if every item has an answer, under ANSWER.

        ANSWER is omitted if no item has other tokens. Of a store of pooled rows, one entry for each of them, under its
        name, such as `mean@answer`. Raises DataError for raw logits, and for items without tokens or with NaN.
        """
        self.refuse_logits()
        self._read(items)
        places = items.tolist()
        names = [name for name in self._rows[places[0]] if all(name in self._rows[item] for item in places)]
        if self._has_others.isdisjoint(places):
            names = [name for name in names if name != ANSWER]
        return {name: np.stack([self._rows[item][name] for item in places]).astype(np.float64) for name in names}

    def places_of(self, other: FeatureSource) -> Positions:
        """The position in this store of each item of `other`, found by name and prompt.

        Raises DataError for an item that this store lacks or holds more than once.
        """
        if base_of(other) is base_of(self.source):
            return np.arange(len(other.items.names))
        there: dict[tuple[str, str], list[int]] = {}
        for place, known_by in enumerate(zip(self.source.items.names, self.source.items.prompts, strict=True)):
            there.setdefault(known_by, []).append(place)
        wanted = list(zip(other.items.names, other.items.prompts, strict=True))
        problems = [
            f"{name!r} with the prompt {prompt!r} is {f'there {len(found)} times' if found else 'not there'}"
            for name, prompt in wanted
            if len(found := there.get((name, prompt), [])) != 1
        ]
        if problems:
            where = f"{location_of(self.source)}, which the baselines of {location_of(other)} are to read"
            raise DataError.from_problems(where, problems)
        return np.array([there[known_by][0] for known_by in wanted], dtype=np.int64)

    def _read(self, items: Positions) -> None:
        """Read the items that were not read before."""
        missing = np.array([item for item in np.unique(items).tolist() if item not in self._rows], dtype=np.int64)
        empty = missing[np.asarray(self.source.n_tokens)[missing] == 0]
        if len(empty):
            message = f"{self.source.items.names[empty[0]]!r} has no tokens"
            raise DataError(message)
        found: dict[int, dict[str, NDArray[np.floating]]] = {}
        others: set[int] = set()
        for place, tokens in read_checked(self.source, missing):
            item = int(missing[place])
            if self._pooled:
                found[item] = dict(zip(self._pooled, tokens.rows.float().numpy(), strict=True))
                continue
            found[item], has_others = _means(tokens)
            others |= {item} if has_others else set()
        self._rows |= found
        self._has_others |= others


def _means(item: ItemRows) -> tuple[dict[str, NDArray[np.floating]], bool]:
    """The mean of all rows and, where there are any, of the answer's rows, and whether there are other rows."""
    rows, chosen = item.rows.double(), item.roles == TOKEN_ROLES[ANSWER]
    count = int(chosen.sum())
    answer = {ANSWER: rows[chosen].mean(0).numpy()} if count else {}
    return {ALL: rows.mean(0).numpy(), **answer}, count < len(rows)


class Evidence:
    """All that the baselines of one label may read; items are positions in the store."""

    def __init__(
        self,
        source: FeatureSource,
        label: str,
        mos: Array,
        *,
        words: RatingWords,
        means: MeanFeatures,
        device: torch.device,
        no_kernel: str | None,
    ) -> None:
        """`mos` has shape (items of the store,); predictors read it for training items only.

        `means` reads `source`, or another store of the same items. Dense regressions are solved on `device`.
        `no_kernel` is why no kernel ridge is tried on features; None where one is. Raises DataError if the store of
        `means` lacks an item.
        """
        self.label, self.mos, self.device, self.no_kernel = label, mos, device, no_kernel
        self._source, self._words, self._means = source, words, means
        self._places = means.places_of(source)

    def facts(self, items: Positions, *, of_words: bool, of_features: bool) -> dict[str, Any]:
        """What all that predictors may read of `items` depends on, ready for JSON.

        `of_words` includes the conversation files, `of_features` the store of the features, device and kernel.
        """
        table = self._source.items
        columns = {name: getattr(table, name, None) or [None] * len(table.names) for name in _COLUMNS}
        texts = [[values[item] for item in items.tolist()] for values in columns.values()]
        facts: dict[str, Any] = {
            "items": items_identity(self._source, items),
            "texts": hashlib.sha256(canonical_json(texts).encode()).hexdigest(),
            "mos": hashlib.sha256(self.mos[items].tobytes()).hexdigest(),
            "scale": self.scale,
        }
        if of_words:
            facts["words"] = self._words.digest
        if of_features:
            read = self._means.source
            facts["features"] = [read.id, content_of(read), self.device.type, self.no_kernel]
        return facts

    def prompts(self, items: Positions) -> list[str]:
        """The normalised prompts."""
        return [normalise_prompt(self._source.items.prompts[item]) for item in items]

    def groups(self, items: Positions) -> NDArray[np.int64]:
        """A number for each prompt."""
        return prompt_groups(self.prompts(items))

    def generators(self, items: Positions) -> list[str]:
        """The generators. Raises DataError if an item has none."""
        return self._column("generators", items, "generator", "join them with `agiqa store labels`")

    def texts(self, items: Positions) -> list[str]:
        """Prompts and descriptions as one text. Raises DataError if an item has no description."""
        texts = self._column("descriptions", items, "description", "extract a store with --conversations")
        return [f"{self._source.items.prompts[item]}\n{text}" for item, text in zip(items, texts, strict=True)]

    def words(self, items: Positions) -> list[int | None]:
        """The classes of the rating words; None for an answer without a clear word.

        Raises DataError if the model itself answered nothing about an item.
        """
        names, prompts = self._source.items.names, self._source.items.prompts
        asked = {names[item]: prompts[item] for item in items}
        found = self._words.of(asked, self.label)
        return [found[names[item]] for item in items]

    def features(self, train: Positions, test: Positions) -> dict[str, tuple[Array, Array]]:
        """The feature rows of both parts, by kind of tokens or name of the row; raises as `MeanFeatures.of`."""
        found = self._means.of(self._places[np.concatenate([train, test])])
        return {tokens: (rows[: len(train)], rows[len(train) :]) for tokens, rows in found.items()}

    def expected_mos(self, items: Positions) -> tuple[Array, list[str]]:
        """The MOS that the model's probabilities of the rating words give, and notes on how the store answers.

        Raises DataError for a store without W_lm, token ids of the words, or a scale of the MOS.
        """
        source = self._means.source
        try:
            return expected_mos(source, self._places[items], self.label), word_notes(source)
        except ViewRefused as error:  # of layers other than the last, and of image encoders
            raise DataError(str(error)) from error

    @property
    def scale(self) -> MosRange | None:
        """The scale of the MOS; None if it is unknown."""
        scales: Mapping[str, MosRange] = getattr(self._source.items, "mos_ranges", {})
        return scales.get(self.label)

    def teachers(self, items: Positions) -> int:
        """The number of items whose text is by a teacher that knew their MOS."""
        authors: Sequence[str | None] = getattr(self._source.items, "text_authors", [])
        return sum(authors[item] == TEACHER for item in items) if authors else 0

    def _column(self, column: str, items: Positions, what: str, remedy: str) -> list[str]:
        """A text column without gaps. A source that is no store may lack it."""
        values: Sequence[str | None] = getattr(self._source.items, column, [None] * len(self._source.items.names))
        chosen = [values[item] for item in items]
        present = [value for value in chosen if value is not None]
        if len(present) < len(chosen):
            message = f"{len(chosen) - len(present)} of {len(chosen)} items have no {what}; {remedy}"
            raise DataError(message)
        return present
