"""The two data sets of a transfer: their names, whether one head can read both, and what they share."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agiqa.bench.recording.result_folders import store_facts
from agiqa.bench.transfer.plan import SHOTS, TransferSettings
from agiqa.errors import AgiqaError, ConfigError, HeadError
from agiqa.heads.data.features import FeatureSource, location_of, read_labels
from agiqa.heads.data.prompt_groups import KnownPrompts
from agiqa.heads.data.scales import conversions, scales_of, unknown_scales
from agiqa.heads.data.splits import Partition, make_partition
from agiqa.heads.data.variants import as_variant
from agiqa.heads.model.head import check_sizes
from agiqa.heads.model.losses import check_loss
from agiqa.heads.model.projection import FeatureSpec, check_encoding
from agiqa.heads.model.reading import check_mix, features_for, rows_are_alike, rows_text
from agiqa.heads.settings.config import HeadConfig
from agiqa.store import AnyStore
from agiqa.store.format.metadata import differing

_MAKING = ("model", "conversation")


@dataclass(frozen=True, kw_only=True)
class Side:
    """One data set of a transfer."""

    name: str
    store: AnyStore
    partition: Partition
    """The parts for heads on all items; few-shot trainings share its test part."""

    def about(self) -> dict[str, Any]:
        """The facts about the data for about.json."""
        return {**store_facts(self.store), "split": self.partition.record()}


def named(source: AnyStore, target: AnyStore, names: str | None) -> dict[str, AnyStore]:
    """Both stores by the names of their data sets: `names` (`A,B`), else those of the provenance or the folders.

    Raises ConfigError unless there are two different names.
    """
    given = [_name_of(store) for store in (source, target)] if names is None else [n.strip() for n in names.split(",")]
    if len(given) != 2 or given[0] == given[1] or not all(given):
        message = f"A transfer needs two names for its data sets, found {', '.join(given)}. Give --names A,B."
        raise ConfigError(message)
    return dict(zip(given, (source, target), strict=True))


def _name_of(store: AnyStore) -> str:
    recorded = store.provenance.get("data_set", {}).get("name")
    return str(recorded or store.path.stem)


def open_sides(stores: Mapping[str, AnyStore], settings: TransferSettings) -> dict[str, Side]:
    """Both sides, read as the `variant` of the settings and checked before anything is trained.

    Raises HeadError where one head cannot read both, ConfigError for two stores of the same items, and, naming the data
    set, what `make_partition` and `read_labels` raise.
    """
    check_sizes(settings.head)
    for config in (settings.train, settings.few_shot):
        check_loss(config)
    stores = {name: as_variant(store, settings.train.variant) for name, store in stores.items()}
    (first, a), (second, b) = stores.items()
    if _hold_the_same_items(a, b):
        where = a.location if a.location == b.location else f"{a.location} and {b.location}"
        message = (
            f"{first} and {second} have the same {len(a.item_keys)} images and conversations ({where}). A transfer "
            "goes from one data set to another: give a store of other images."
        )
        raise ConfigError(message)
    layer = settings.train.layer
    _check_meaning(settings.head, *(features_for(store, settings.head, layer) for store in (a, b)))
    sides: dict[str, Side] = {}
    for name, store in stores.items():
        try:
            source = features_for(store, settings.head, layer)
            check_encoding(source, settings.head.projection)
            check_mix(source, settings.head)
            partition = make_partition(store, settings.train)
            for items in partition.parts().values():
                read_labels(store, items, label=settings.train.label)
        except AgiqaError as error:
            error.add_note(f"while looking at the data set {name!r}, {store.location}")
            raise
        sides[name] = Side(name=name, store=store, partition=partition)
    return sides


def _hold_the_same_items(a: AnyStore, b: AnyStore) -> bool:
    """Whether both have the same images and conversations, in any order: copies, other encodings, views of variants.

    The keys of items tell, which cover image and conversation. A view of an early store has those of its store.
    """
    if a.id == b.id:
        return True
    here, there = (np.unique(store.item_keys, axis=0) for store in (a, b))
    return np.array_equal(here, there)


def chosen_shots(
    targets: Iterable[Side], settings: TransferSettings, shots: Sequence[int] | None
) -> tuple[tuple[int, ...], str | None]:
    """The item counts of the few-shot curve, `shots` or those of SHOTS that every target has; a note on any left out.

    Raises ConfigError where a target has fewer training items than the most of `shots`.
    """
    sizes = [(len(make_partition(one.store, settings.few_shot).train), one.name) for one in targets]
    most, name = min(sizes, key=lambda size: size[0])
    if shots is None:
        kept = tuple(count for count in SHOTS if count <= most)
        others = ", ".join(str(count) for count in SHOTS if count > most)
        return kept, f"{name} has {most} training items: none are drawn of {others}" if others else None
    if max(shots, default=0) > most:
        message = f"{max(shots)} training items of {name} are asked for, and it has {most}. Give fewer --shots."
        raise ConfigError(message)
    return tuple(shots), None


def making_differs(a: AnyStore, b: AnyStore) -> list[str]:
    """Where two stores differ in the model and the conversation behind their features, as dotted names.

    Heads can read both all the same: adapters of one model, for example, share one W_lm.
    """
    pairs = ((key, a.provenance.get(key), b.provenance.get(key)) for key in _MAKING)
    return [name for key, here, there in pairs for name, _, _ in differing(here, there, key)]


def scale_notes(a: Side, b: Side, labels: Sequence[str]) -> list[str]:
    """Lines where predictions must be converted to the other side's MOS scale, or a scale is unknown."""
    here, there = scales_of(a.store, labels), scales_of(b.store, labels)
    found = [
        f"note: {a.name} and {b.name} are on different scales of MOS, and predictions are converted: {line}"
        for line in conversions(labels, here, there)
    ]
    mos = read_labels(b.store, b.partition.test, label="+".join(labels))
    return found + [f"warning: {line}" for line in unknown_scales(a.store.location, here, b.store, labels, mos)]


def shared(source: Side, target: Side) -> dict[str, Any]:
    """How many test items of `target` occur in the training items of `source`: by prompt, and as the same item.

    Prompts are compared as by `normalise_prompt`, and also letter by letter.
    """
    learned = np.concatenate([source.partition.train, source.partition.validation])
    known = KnownPrompts(source.store.items.prompts[item] for item in learned)
    keys = {key.tobytes() for key in source.store.item_keys[learned]}
    test = target.partition.test
    prompts = known.count(target.store.items.prompts[item] for item in test)
    return {
        "test_items": len(test),
        "with_a_prompt_of_the_source": prompts.same,
        "with_a_prompt_of_the_source_verbatim": prompts.verbatim,
        "that_are_items_of_the_source": sum(key.tobytes() in keys for key in target.store.item_keys[test]),
    }


def _check_meaning(head: HeadConfig, first: FeatureSource, second: FeatureSource) -> None:
    """Raise HeadError, with a remedy, where features of the two stores mean different things to `head`."""
    here, there = FeatureSpec.of(first), FeatureSpec.of(second)
    a, b = location_of(first), location_of(second)
    if (here.tap, here.layer) != (there.tap, there.layer):
        layers = [f"layer {spec.layer}{f' of the tap {spec.tap}' if spec.tap else ''}" for spec in (here, there)]
        problem = f"of {a} it reads {layers[0]}, of {b} {layers[1]}. Extract both alike."
    elif not rows_are_alike(head, here, there):
        problem = f"of {a} it reads {rows_text(here)}, of {b} {rows_text(there)}. Extract both alike."
    elif "" not in (here.lm_head_sha256, there.lm_head_sha256) and here.lm_head_sha256 != there.lm_head_sha256:
        problem = (
            f"{a} belongs to the language-model head {here.lm_head_sha256[:12]}, {b} to "
            f"{there.lm_head_sha256[:12]}. Extract both with the same model."
        )
    elif here.encoding != there.encoding and "sketch" in (here.encoding, there.encoding):
        sketch, other, held = (a, b, there.encoding) if here.encoding == "sketch" else (b, a, here.encoding)
        problem = (
            f"{sketch} is a sketch, and {other} holds {held!r} features. Sketch its hidden "
            f"states in the same basis: `agiqa store sketch {other} OUT --basis {sketch}`."
        )
    elif here.basis_id != there.basis_id:
        problem = (
            f"{a} is a sketch in the basis {str(here.basis_id)[:12]}, {b} in "
            f"{str(there.basis_id)[:12]}. Make the second anew, from the store of hidden states that it came from: "
            f"`agiqa store sketch STORE OUT --basis {a}`."
        )
    elif (here.encoding, here.width) != (there.encoding, there.width):
        problem = (
            f"{a} holds {here.encoding!r} features of width {here.width}, {b} {there.encoding!r} of "
            f"{there.width}. Extract or convert one of them with the settings of the other."
        )
    else:
        return
    message = f"No head can read both stores: {problem}"
    raise HeadError(message)
