"""Plan: tokenise every item, check lengths, and write all of a store but the features. Needs no weights."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import DataError
from agiqa.extract.data.items import DataSet, Item, OnBadItem, item_key, read_image
from agiqa.extract.filling.targets import Target
from agiqa.extract.models import Backbone, Prepared
from agiqa.extract.models.preparing import Preparation
from agiqa.store import TOKEN_ROLES, Items, Store, StorePlan, create_store
from agiqa.store.format.labels import MosRange
from agiqa.version import agiqa_version

_NO_LIMIT = 1 << 30
_SHORTEN = "Give --truncate, --on-bad-item skip, or a higher --max-tokens where that set the limit."
"""What to do about an item that is too long for a store."""


@dataclass(frozen=True, kw_only=True)
class LengthRule:
    """What happens to a conversation that is longer than the limit."""

    max_tokens: int | None = None
    """Tokens; None stands for the model's own number of positions."""
    truncate: bool = False
    """Cut what is too long, and count it; otherwise it is a bad item."""
    on_bad_item: OnBadItem = "fail"


@dataclass(frozen=True, kw_only=True)
class TokenisedItems:
    """The items that will be stored, with their tokens; entry i of every list belongs to item i."""

    items: list[Item]
    token_ids: list[NDArray[np.int32]]
    roles: list[NDArray[np.uint8]]
    keys: list[bytes]
    truncated: list[bool]
    skipped: list[str]


@dataclass(frozen=True, kw_only=True)
class _Tokens:
    """What the plan keeps of one item."""

    token_ids: NDArray[np.int32]
    roles: NDArray[np.uint8]
    key: bytes
    truncated: bool


@dataclass(frozen=True, kw_only=True)
class PlannedItem:
    """One item as it is in the plan of a store."""

    item: Item
    length: int
    """Tokens."""

    def __str__(self) -> str:
        """For messages."""
        return f"item {self.item.name!r} ({self.length} tokens)"


def tokenise(
    data_set: DataSet,
    backbone: Backbone,
    rule: LengthRule,
    *,
    advance: Callable[[int], None] = lambda _items: None,
    preparation: Preparation | None = None,
) -> TokenisedItems:
    """Prepare every item of `data_set` for `backbone`, in the workers of `preparation`, and keep its tokens.

    Raises DataError with all items that are too long or cannot be prepared, unless `rule` skips or truncates.
    """
    limit = min(position_limit(backbone), rule.max_tokens or _NO_LIMIT)
    found = TokenisedItems(items=[], token_ids=[], roles=[], keys=[], truncated=[], skipped=[])
    preparation = preparation or Preparation(backbone)
    tokens_of = partial(_tokens_of, limit=limit, truncate=rule.truncate)
    answers = preparation.each(tokens_of, data_set.items, lost=lambda _item, reason: reason)
    for item, tokens in zip(data_set.items, answers, strict=True):
        if isinstance(tokens, str):
            found.skipped.append(f"{item.name}: {tokens}")
        else:
            found.items.append(item)
            found.token_ids.append(tokens.token_ids)
            found.roles.append(tokens.roles)
            found.keys.append(tokens.key)
            found.truncated.append(tokens.truncated)
        advance(1)
    if found.skipped and (rule.on_bad_item == "fail" or not found.items):
        raise DataError.from_problems(data_set.name, found.skipped)
    return found


def position_limit(backbone: Backbone) -> int:
    """The tokens of the longest item that `backbone` was made for."""
    return _NO_LIMIT if backbone.max_positions is None else backbone.max_positions


def _tokens_of(backbone: Backbone, item: Item, *, limit: int, truncate: bool) -> _Tokens | str:
    """The tokens of `item`, or why it cannot be used."""
    try:
        image = read_image(item)
        prepared = backbone.prepare(item.conversation, image)
        cut = fit(prepared, limit, truncate=truncate)
        return _Tokens(
            token_ids=cut.token_ids,
            roles=cut.roles,
            key=item_key(item, image),
            truncated=len(cut.token_ids) < len(prepared.token_ids),
        )
    except DataError as error:
        return str(error)


def prepare_planned(backbone: Backbone, planned: PlannedItem) -> Prepared:
    """The item as the plan has it: cut to its length. Raises DataError when it cannot be read any more, or changed."""
    prepared = prepare_item(backbone, planned.item, planned.length, truncate=True)
    if len(prepared.token_ids) != planned.length:
        message = f"item {planned.item.name!r} has changed since the store was planned. Extract to another path."
        raise DataError(message)
    return prepared


def prepare_item(backbone: Backbone, item: Item, limit: int, *, truncate: bool, remedy: str = _SHORTEN) -> Prepared:
    """What the model reads of `item`, see `fit`. Raises DataError, which names the item."""
    try:
        return fit(backbone.prepare(item.conversation, read_image(item)), limit, truncate=truncate, remedy=remedy)
    except DataError as error:
        error.add_note(f"while reading item {item.name!r}")
        raise


def fit(prepared: Prepared, limit: int, *, truncate: bool, remedy: str = _SHORTEN) -> Prepared:
    """`prepared`, cut to `limit` tokens if it is longer and `truncate` is set.

    Raises DataError when it is longer and may not be cut, which ends with `remedy`, or when the cut would go through
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


def plan_store(
    path: Path,
    data_set: DataSet,
    backbone: Backbone,
    tokenised: TokenisedItems,
    *,
    rule: LengthRule,
    conversation: dict[str, str],
    target: Target,
) -> Store:
    """Create the store at `path`, or take up the one that was planned alike.

    `conversation` says how the items were worded (variant and aspect) and goes into the provenance; `target` says
    what is stored of the hidden states. Raises SettingsConflict, see `create_store`.
    """
    provenance: dict[str, Any] = {
        "agiqa": agiqa_version(),
        "model": backbone.provenance(),
        "conversation": conversation,
        "data_set": {
            "items": len(tokenised.items),
            "skipped": len(tokenised.skipped) + len(data_set.skipped),
            "plan_sha256": _plan_hash(tokenised),
        },
        "tokens": {"max_tokens": rule.max_tokens, "truncated": sum(tokenised.truncated)},
        **target.provenance(),
    }
    plan = StorePlan(
        encoding=target.encoding,
        logical_dtype=target.logical_dtype(backbone),
        width=target.width(backbone),
        kept_logits=backbone.vocab_size if target.keep_logits else None,
        provenance=provenance,
        items=item_table(tokenised.items, mos_range=data_set.mos_range),
        token_ids=tokenised.token_ids,
        roles=tokenised.roles,
        item_keys=tokenised.keys,
        truncated=tokenised.truncated,
        label_table=data_set.table,
    )
    return create_store(path, plan)


def item_table(items: Sequence[Item], *, mos_range: MosRange | None = None) -> Items:
    """The store's item table, its MOS on the scale `mos_range`; an aspect that no item has a MOS for gets no column."""
    aspects = sorted({aspect for item in items for aspect in item.labels})
    return Items(
        names=[item.name for item in items],
        prompts=[item.prompt for item in items],
        splits=[item.split for item in items],
        generators=[item.generator for item in items],
        descriptions=[item.description for item in items],
        labels={aspect: np.array([item.labels.get(aspect, np.nan) for item in items]) for aspect in aspects},
        text_authors=[item.text_author for item in items],
        mos_ranges={} if mos_range is None else dict.fromkeys(aspects, mos_range),
    )


def _plan_hash(tokenised: TokenisedItems) -> str:
    digest = hashlib.sha256()
    for item, key, ids, roles in zip(
        tokenised.items, tokenised.keys, tokenised.token_ids, tokenised.roles, strict=True
    ):
        name = item.name.encode()
        for part in (name, key, ids.astype("<i4").tobytes(), roles.tobytes()):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
