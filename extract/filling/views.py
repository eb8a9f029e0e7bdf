"""Which shorter conversations a store can be read as: those whose tokens and states are the first of every item.

A chat template may write the beginning of a longer conversation otherwise, and a model may let tokens read later ones.
Both are tried out. A shorter conversation that fails is left out, and a note says why.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from agiqa.errors import SettingsConflict, listed
from agiqa.extract.data.templates import prefixes_of
from agiqa.extract.filling.engines import Engine, Here
from agiqa.extract.filling.plan import PlannedItem, TokenisedItems, prepare_planned
from agiqa.extract.filling.prefixes import NO_BEGINNING
from agiqa.extract.filling.settings import ExtractionSettings
from agiqa.extract.filling.starting import Phases
from agiqa.extract.filling.targets import Target
from agiqa.extract.models.batches import BatchRunner
from agiqa.extract.models.checks import BATCH_TOLERANCE
from agiqa.extract.models.devices import DTYPES
from agiqa.progress import Advance, say
from agiqa.store import Prefixes, is_planned, open_store
from agiqa.store.format.prefixes import PREFIXES, author_numbers


def possible_views(settings: ExtractionSettings, target: Target) -> dict[str, int]:
    """The shorter conversations that may be views of the store, and how many messages each has.

    Pooled rows are of whole conversations, and a tap reads none, so they have none.
    """
    return {} if target.poolings or target.tap is not None else prefixes_of(settings.variant, settings.aspect)


def chosen_prefixes(
    engine: Engine,
    tokenised: TokenisedItems,
    path: Path,
    settings: ExtractionSettings,
    target: Target,
    phases: Phases,
) -> Prefixes | None:
    """The shorter conversations as which the store at `path` can be read; None if there are none.

    Those of a store that is resumed or grown are the ones that it was planned with. For a new store the model is
    tried out, so one that is only planned has none. Raises SettingsConflict for a new item that lacks one of them.
    """
    ends = possible_views(settings, target)
    names = [*ends]
    failing = {name: _failing(tokenised, place) for place, name in enumerate(names)}
    if is_planned(path):
        kept = list(open_store(path, allow_partial=True).provenance.get(PREFIXES, ()))
        if not set(kept) <= ends.keys():  # a store of another variant or tap, which `create_store` refuses
            return None
        if lost := [name for name in kept if failing[name]]:
            message = (
                f"{path} can be read as {lost[0]!r}, and {_reason(tokenised, failing[lost[0]])}. Leave these items "
                "out, or extract all items to another path."
            )
            raise SettingsConflict(message)
    else:
        kept = [name for name in names if not failing[name]]
        for name in names:
            if failing[name]:
                say(f"note: the store cannot be read as {name!r}: {_reason(tokenised, failing[name])}")
        if kept and (
            settings.plan_only or not _is_causal(engine, tokenised, ends[kept[0]], names.index(kept[0]), phases)
        ):
            kept = []
    return _prefixes(tokenised, names, kept) if kept else None


def _failing(tokenised: TokenisedItems, place: int) -> list[str]:
    """The items whose first tokens are not those of the shorter conversation number `place`."""
    return [one.item.name for one in tokenised.tokenised if one.beginnings[place] == NO_BEGINNING]


def _reason(tokenised: TokenisedItems, items: Sequence[str]) -> str:
    return (
        f"the first tokens of {len(items)} of {len(tokenised.tokenised)} items ({listed(items, 2)}) are not those of "
        "the shorter conversation, which the chat template or the tokenizer writes otherwise"
    )


def _prefixes(tokenised: TokenisedItems, names: Sequence[str], kept: Sequence[str]) -> Prefixes:
    places = [names.index(name) for name in kept]
    rows = [[one.beginnings[place] for place in places] for one in tokenised.tokenised]
    authors = author_numbers([one.item.prefix_authors for one in tokenised.tokenised], kept)
    keys = b"".join(one.beginning_keys[place] for one in tokenised.tokenised for place in places)
    return Prefixes(
        names=tuple(kept),
        rows=np.array(rows, np.int32),
        authors=authors,
        keys=np.frombuffer(keys, np.uint8).reshape(len(rows), -1),
    )


def _is_causal(engine: Engine, tokenised: TokenisedItems, messages: int, place: int, phases: Phases) -> bool:
    """Whether the states of a shorter conversation, of so many `messages`, are the first ones of an item.

    The item is the one that goes on longest: rotary frequencies may change with the length.
    """
    one = max(tokenised.tokenised, key=lambda one: len(one.token_ids) - one.beginnings[place])
    rows, item = one.beginnings[place], one.item
    short = PlannedItem(
        item=replace(item, conversation=item.conversation[:messages]),
        token_ids=one.token_ids[:rows],
        roles=one.roles[:rows],
    )
    with phases.timed("load"):
        engine.load()
    with phases.timed("plan"):
        error, tolerance = engine.run(
            partial(state_error, whole=one.planned, short=short), items=0, advance=lambda _: None
        )
    if error <= tolerance:
        return True
    say(
        f"note: the store cannot be read as shorter conversations: the states of the first {rows} tokens of "
        f"{item.name} change by {error:.2g} of their norm when the conversation goes on, so the model does not read "
        f"from left to right only (rounding explains {tolerance:.2g})"
    )
    return False


def state_error(here: Here, _advance: Advance, *, whole: PlannedItem, short: PlannedItem) -> tuple[float, float]:
    """A task: the relative difference of the states of `short` from the first ones of `whole`, and the largest allowed.

    In the Frobenius norm. Raises WorkerError for an item that does not fit into the memory.
    """
    backbone, found = here.backbone, list[torch.Tensor]()

    def compute(items: Sequence[PlannedItem]) -> None:
        found.extend(backbone.hidden_states([prepare_planned(backbone, one) for one in items]))

    BatchRunner(1).run(compute, [short, whole], name=str)
    alone, first = (states.double() for states in found)
    expected = first[: len(alone)]
    error = float((alone - expected).norm() / expected.norm().clamp(min=1e-12))
    return error, BATCH_TOLERANCE[DTYPES[backbone.logical_dtype]]
