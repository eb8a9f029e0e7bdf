"""What the runs of a grid read, stores or views of them, and the baselines beside their heads."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from agiqa.bench.ablation.grids import PlannedRun
from agiqa.bench.baselines.baselines import FEATURES, run_baselines
from agiqa.bench.baselines.evidence import MeanFeatures, RatingWords
from agiqa.bench.baselines.predictors import BASELINES
from agiqa.bench.baselines.recorded import RecordedBaselines
from agiqa.bench.recording.result_folders import Line
from agiqa.errors import AgiqaError
from agiqa.heads.data.features import FeatureSource
from agiqa.heads.data.layers import layer_of, read_layer
from agiqa.heads.data.splits import PARTITION_SETTINGS
from agiqa.heads.data.variants import as_variant
from agiqa.heads.settings.config import TrainConfig
from agiqa.heads.settings.device import resolve_device
from agiqa.store import AnyStore

_DRAWING_SETTINGS = tuple(name for name in PARTITION_SETTINGS if name not in ("fold", "held_out", "validation"))
"""Runs that differ in these settings need separate baselines. Baselines are fitted on validation items too."""

KERNEL_LAYERS = 8
"""Most layers that each get a kernel ridge on a CPU, where one takes about 10 s for 2,400 items and one split."""
_Fit = tuple[Callable[..., list[Line]], Mapping[str, Any]]
"""The baselines of one protocol and drawing of items, and the settings that name it."""

Key = tuple[str, str | None]
"""The name of a store, and the variant as which runs read it; None for its own."""


def key_of(run: PlannedRun) -> Key:
    """What a run reads."""
    return run.store, run.train.variant


def sources_of(stores: Mapping[str, AnyStore], plan: Sequence[PlannedRun]) -> dict[Key, FeatureSource]:
    """What the runs of `plan` read, by store and variant.

    Raises what `as_variant` raises, naming the first run of that store and variant.
    """
    sources: dict[Key, FeatureSource] = {}
    for name, store in stores.items():
        for run in plan:
            if run.store == name and key_of(run) not in sources:
                try:
                    sources[key_of(run)] = as_variant(store, run.train.variant)
                except AgiqaError as error:
                    error.add_note(f"in {run.name}, a run of this grid; nothing was trained")
                    raise
    return sources


def mean_features(
    sources: Mapping[Key, FeatureSource], plan: Sequence[PlannedRun], baseline_store: AnyStore | None
) -> dict[Key, dict[str, MeanFeatures]]:
    """What the baseline `features` reads, by source and by layer of its heads, in the order of the plan.

    It is a `baseline_store`, as the same variant, or the source itself. Raises DataError for a `baseline_store` that
    does not fit one of the sources, and UnknownName for a layer that a source lacks.
    """
    found: dict[Key, dict[str, MeanFeatures]] = {key: {} for key in sources}
    shared: dict[tuple[str | None, str], MeanFeatures] = {}
    for run in plan:
        key, variant = key_of(run), run.train.variant
        source = read_layer(sources[key], run.train.layer)
        layer = layer_of(source)
        if baseline_store is None:
            found[key].setdefault(layer, MeanFeatures(source))
            continue
        if (variant, layer) not in shared:
            shared[variant, layer] = MeanFeatures(read_layer(as_variant(baseline_store, variant), layer))
            shared[variant, layer].refuse_logits()
        if layer not in found[key]:
            shared[variant, layer].places_of(sources[key])
            found[key][layer] = shared[variant, layer]
    return found


def sketch_notes(means: Mapping[Key, Mapping[str, MeanFeatures]]) -> Iterator[str]:
    """A note where the baseline of some stores reads a sketch."""
    sketched = {
        name: None for (name, _), by in means.items() if any(one.source.encoding == "sketch" for one in by.values())
    }
    names = list(sketched)
    if names:
        where = f" of {', '.join(name for name in names if name)}" if any(names) else ""
        yield (
            f"note: the baseline on mean features{where} reads a sketch only, which holds less than the hidden states "
            "that it was made from: heads look better beside it. --baseline-store names hidden states to read."
        )


def fit_baselines(
    sources: Mapping[Key, FeatureSource],
    plan: Sequence[PlannedRun],
    out: Path,
    words: RatingWords,
    means: Mapping[Key, Mapping[str, MeanFeatures]],
    recorded: RecordedBaselines,
) -> list[Line]:
    """The baselines of every store, variant, protocol and drawing of items; `features` for every layer.

    Those that are `recorded` are not fitted again.
    """
    found: list[Line] = []
    for key, source in sources.items():
        several = len({other for store, other in sources if store == key[0]}) > 1
        by_protocol: dict[str, dict[tuple[Any, ...], list[TrainConfig]]] = {}
        for run in plan:
            if key_of(run) == key:
                how = tuple(getattr(run.train, setting) for setting in _DRAWING_SETTINGS)
                by_protocol.setdefault(run.protocol, {}).setdefault(how, []).append(run.train)
        fits: list[_Fit] = []
        for protocol, drawn in by_protocol.items():
            varied = [k for k in range(len(_DRAWING_SETTINGS)) if len({how[k] for how in drawn}) > 1]
            for how, trained in drawn.items():
                shown = {**({"variant": key[1]} if several else {}), **{_DRAWING_SETTINGS[k]: how[k] for k in varied}}
                fit = partial(run_baselines, source, trained, protocol=protocol, out=out, words=words)
                fits.append((partial(fit, store_name=key[0], recorded=recorded), shown))
        found += _of_layers(fits, means[key], resolve_device(plan[0].train.device))
    return found


def _of_layers(fits: Sequence[_Fit], means: Mapping[str, MeanFeatures], device: torch.device) -> list[Line]:
    """The lines of all baselines, fit by fit; with several layers one of `features` for each, named by it.

    All fits read one layer before the next, so that the rows of one layer are in memory.
    """
    if len(means) == 1:
        return [line for fit, shown in fits for line in fit(means=next(iter(means.values())), shown=shown)]
    others = [name for name in BASELINES if name != FEATURES]
    lines = [fit(shown=shown, names=others) for fit, shown in fits]
    for layer, of_layer in means.items():
        for found, (fit, shown) in zip(lines, fits, strict=True):
            named = {**shown, "layer": layer}
            found += fit(means=of_layer, shown=named, names=[FEATURES], no_kernel=_no_kernel(len(means), device))
        of_layer.forget()
    return [line for found in lines for line in found]


def _no_kernel(layers: int, device: torch.device) -> str | None:
    """Why no kernel ridge is tried on each of so many layers; None where it is."""
    if device.type != "cpu" or layers <= KERNEL_LAYERS:
        return None
    return f"kernel ridge is not tried on more than {KERNEL_LAYERS} layers without a GPU, and there are {layers}"
