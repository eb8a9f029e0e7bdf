"""Plan: tokenise every item, check lengths, and write the whole store except the features. Needs no weights."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import DataError
from agiqa.extract.data.items import DataSet, Item, OnBadItem, item_key, read_image
from agiqa.extract.filling.compiled import KEY
from agiqa.extract.filling.kept import KEPT
from agiqa.extract.filling.pooling import Pooling, lacking
from agiqa.extract.filling.prefixes import rows_of_beginnings
from agiqa.extract.filling.targets import Target, stored_roles
from agiqa.extract.models import Backbone, Prepared
from agiqa.extract.models.preparing import Preparation
from agiqa.extract.models.rating_tokens import RATING_TOKENS, rating_tokens
from agiqa.store import TOKEN_ROLES, Items, Prefixes, StorePlan
from agiqa.store.format.labels import MosRange
from agiqa.version import agiqa_version

_Tag = TypeVar("_Tag")

_NO_LIMIT = 1 << 30
_SHORTEN = "Give --truncate, --on-bad-item skip, or a higher --max-tokens where that set the limit."
"""What to do about an item that is too long for a store."""


@dataclass(frozen=True, kw_only=True)
class LengthRule:
    """What happens to a conversation that is longer than the limit."""

    max_tokens: int | None = None
    """Tokens; None for the model's own number of positions."""
    truncate: bool = False
    """Cut longer conversations, and count them; otherwise they are bad items."""
    on_bad_item: OnBadItem = "fail"


@dataclass(frozen=True, kw_only=True)
class TokenisedItem:
    """One item with its tokens."""

    item: Item
    token_ids: NDArray[np.int32]
    """(n,)"""
    roles: NDArray[np.uint8]
    """(n,)"""
    key: bytes
    """See `item_key`."""
    truncated: bool
    beginnings: tuple[int, ...] = ()
    """See `rows_of_beginnings`."""
    beginning_keys: tuple[bytes, ...] = ()
    """The key of each of these shorter conversations."""

    @property
    def planned(self) -> "PlannedItem":
        """The item, as a store plans it."""
        return PlannedItem(item=self.item, token_ids=self.token_ids, roles=self.roles)


@dataclass(frozen=True, kw_only=True)
class TokenisedItems:
    """The items that will be stored, in order, and a line about each of those that will not."""

    tokenised: list[TokenisedItem]
    skipped: list[str]

    @property
    def items(self) -> list[Item]:
        """The items alone."""
        return [one.item for one in self.tokenised]

    @property
    def planned(self) -> "list[PlannedItem]":
        """The items, as a store plans them."""
        return [one.planned for one in self.tokenised]

    @property
    def truncated(self) -> int:
        """How many items were cut."""
        return sum(one.truncated for one in self.tokenised)


@dataclass(frozen=True, kw_only=True)
class PlannedItem:
    """One item of a planned store."""

    item: Item
    token_ids: NDArray[np.int32]
    """(n,)"""
    roles: NDArray[np.uint8]
    """(n,)"""

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.token_ids)

    def __str__(self) -> str:
        """For messages."""
        return f"item {self.item.name!r} ({self.length} tokens)"


def tokenise(
    data_set: DataSet,
    backbone: Backbone,
    rule: LengthRule,
    *,
    poolings: Sequence[Pooling] = (),
    ends: Mapping[str, int] = MappingProxyType({}),
    advance: Callable[[int], None] = lambda _items: None,
    preparation: Preparation[Backbone] | None = None,
) -> TokenisedItems:
    """The tokens of every item of `data_set` for `backbone`, made in the workers of `preparation`.

    `ends` has the number of messages of shorter conversations, whose rows are counted, see `rows_of_beginnings`. An
    image that was not checked when its item was made is decoded. Raises DataError with all items that are too long,
    cannot be prepared, or have no tokens for one of `poolings`, unless `rule` skips or truncates.
    """
    limit = min(position_limit(backbone), rule.max_tokens or _NO_LIMIT)
    found = TokenisedItems(tokenised=[], skipped=[])
    preparation = preparation or Preparation(backbone)
    tokenise_one = partial(_tokenise_one, limit=limit, truncate=rule.truncate, poolings=poolings, ends=dict(ends))
    answers = preparation.each(
        tokenise_one, data_set.items, lost=lambda _item, reason: reason, is_safe=lambda item: item.is_checked
    )
    for item, one in zip(data_set.items, answers, strict=True):
        if isinstance(one, str):
            found.skipped.append(f"{item.name}: {one}")
        else:
            found.tokenised.append(replace(one, item=item))  # a worker's answer holds a copy
        advance(1)
    if found.skipped and (rule.on_bad_item == "fail" or not found.tokenised):
        raise DataError.from_problems(data_set.name, found.skipped)
    return found


def position_limit(backbone: Backbone) -> int:
    """The tokens of the longest item that `backbone` was made for."""
    return _NO_LIMIT if backbone.max_positions is None else backbone.max_positions


def _tokenise_one(
    backbone: Backbone,
    item: Item,
    *,
    limit: int,
    truncate: bool,
    poolings: Sequence[Pooling],
    ends: Mapping[str, int],
) -> TokenisedItem | str:
    """The tokens of `item`, or why it cannot be used."""
    try:
        image = read_image(item)
        prepared = backbone.outline(item.conversation, image, size=item.checked_size)
        cut = fit(prepared, limit, truncate=truncate)
        if (reason := lacking(poolings, cut.roles)) is not None:
            return reason
        return TokenisedItem(
            item=item,
            token_ids=cut.token_ids,
            roles=cut.roles,
            key=item_key(item, image),
            truncated=len(cut.token_ids) < len(prepared.token_ids),
            beginnings=rows_of_beginnings(backbone, item, image, cut, limit=limit, ends=ends),
            beginning_keys=tuple(item_key(item, image, messages=count) for count in ends.values()),
        )
    except DataError as error:
        return str(error)


def prepare_planned(backbone: Backbone, planned: PlannedItem) -> Prepared:
    """The item cut to its planned length. Raises DataError when it cannot be read, or has other tokens than planned."""
    prepared = prepare_item(backbone, planned.item, planned.length, truncate=True)
    same = np.array_equal(prepared.token_ids, planned.token_ids) and np.array_equal(prepared.roles, planned.roles)
    if not same:
        message = (
            f"item {planned.item.name!r} has changed since the store was planned: its {len(prepared.token_ids)} tokens "
            f"are not the {planned.length} planned ones. Extract to another path."
        )
        raise DataError(message)
    return prepared


def prepared_groups(
    preparation: Preparation[Backbone], groups: Iterable[tuple[_Tag, Sequence[PlannedItem]]], *, images: bool
) -> Iterator[tuple[_Tag, list[Prepared]]]:
    """`groups` of items, with a tag each, as the model reads them; without `images`, the plan has all of it already."""
    if images:
        yield from preparation.groups(prepare_planned, groups, is_safe=lambda planned: planned.item.is_checked)
        return
    for tag, items in groups:
        yield tag, [Prepared(token_ids=one.token_ids, roles=one.roles) for one in items]


def prepare_item(backbone: Backbone, item: Item, limit: int, *, truncate: bool, remedy: str = _SHORTEN) -> Prepared:
    """What the model reads of `item`, see `fit`. Raises DataError, which names the item."""
    try:
        return fit(backbone.prepare(item.conversation, read_image(item)), limit, truncate=truncate, remedy=remedy)
    except DataError as error:
        error.add_note(f"while reading item {item.name!r}")
        raise


def fit(prepared: Prepared, limit: int, *, truncate: bool, remedy: str = _SHORTEN) -> Prepared:
    """`prepared`, with `truncate` cut to `limit` tokens.

    Raises DataError when it is longer and may not be cut, with `remedy` at the end, or when the cut would go through
    the image.
    """
    length = len(prepared.token_ids)
    if length <= limit:
        return prepared
    if not truncate:
        message = f"{length} tokens, the limit is {limit}. {remedy}"
        raise DataError(message)
    if (prepared.roles[limit:] == TOKEN_ROLES["image"]).any():
        message = f"{length} tokens, and a cut at {limit} would go through the image. Give a higher --max-tokens."
        raise DataError(message)
    return replace(prepared, token_ids=prepared.token_ids[:limit], roles=prepared.roles[:limit])


def store_plan(
    data_set: DataSet,
    backbone: Backbone,
    tokenised: TokenisedItems,
    *,
    rule: LengthRule,
    conversation: dict[str, str],
    target: Target,
    compiled: bool = False,
    kept: bool = False,
    grown: Sequence[int] = (),
    prefixes: Prefixes | None = None,
) -> StorePlan:
    """The plan of a store.

    Into the provenance go `conversation`, the variant and aspect of the wording; `compiled`, whether the model's layers
    are compiled; `kept`, whether rows may have been kept while the model described; `grown`, how many items the store
    had each time when it got more; and the names of `prefixes`, the shorter conversations as which it can be read.
    """
    words = rating_tokens(backbone)
    provenance: dict[str, Any] = {
        "agiqa": agiqa_version(),
        "model": backbone.provenance(),
        "conversation": conversation,
        "data_set": {
            "items": len(tokenised.tokenised),
            "skipped": len(tokenised.skipped) + len(data_set.skipped),
            "plan_sha256": _plan_hash(tokenised),
            **({"grown": list(grown)} if grown else {}),
        },
        "tokens": {"max_tokens": rule.max_tokens, "truncated": tokenised.truncated},
        **target.provenance(),
        **({KEY: True} if compiled else {}),
        **({KEPT: True} if kept else {}),
        **({} if words is None else {RATING_TOKENS: words}),
    }
    others = {layer: target.of(layer) for layer in target.layers[:-1]}
    rows = [stored_roles(backbone, target, one.roles) for one in tokenised.tokenised]
    has_tokens = target.tap is None and not target.poolings
    return StorePlan(
        encoding=target.encoding,
        logical_dtype=target.logical_dtype(backbone),
        width=target.width(backbone),
        layers=target.layers,
        layer_widths={layer: one.width(backbone) for layer, one in others.items()},
        layer_dtypes={layer: one.logical_dtype(backbone) for layer, one in others.items()},
        layer_count=backbone.layer_count,
        pooled=[str(pooling) for pooling in target.poolings],
        tap=target.tap,
        kept_logits=backbone.vocab_size if target.keep_logits else None,
        provenance=provenance,
        items=item_table(tokenised.items, mos_range=data_set.mos_range),
        token_ids=[
            one.token_ids if has_tokens else np.zeros(len(roles), np.int32)
            for one, roles in zip(tokenised.tokenised, rows, strict=True)
        ],
        roles=rows,
        item_keys=[one.key for one in tokenised.tokenised],
        truncated=[one.truncated for one in tokenised.tokenised],
        label_table=data_set.table,
        breaks=grown,
        prefixes=prefixes,
    )


def item_table(items: Sequence[Item], *, mos_range: MosRange | None = None) -> Items:
    """The store's item table, its MOS on the scale `mos_range`; an aspect without any MOS gets no column."""
    aspects, spread, levels = (
        sorted({*chain.from_iterable(found)})
        for found in (
            (item.labels for item in items),
            (item.deviations for item in items),
            (item.counts for item in items),
        )
    )
    return Items(
        names=[item.name for item in items],
        prompts=[item.prompt for item in items],
        splits=[item.split for item in items],
        generators=[item.generator for item in items],
        descriptions=[item.description for item in items],
        labels={aspect: np.array([item.labels.get(aspect, np.nan) for item in items]) for aspect in aspects},
        text_authors=[item.text_author for item in items],
        mos_ranges={} if mos_range is None else dict.fromkeys(aspects, mos_range),
        deviations={aspect: np.array([item.deviations.get(aspect, np.nan) for item in items]) for aspect in spread},
        counts={level: np.array([item.counts.get(level, np.nan) for item in items]) for level in levels},
    )


def _plan_hash(tokenised: TokenisedItems) -> str:
    digest = hashlib.sha256()
    for one in tokenised.tokenised:
        for part in (one.item.name.encode(), one.key, one.token_ids.astype("<i4").tobytes(), one.roles.tobytes()):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
