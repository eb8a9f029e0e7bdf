"""What a head reads, as its run records it: the wording, the model, and the layers and rows of features."""

from functools import partial
from pathlib import Path
from typing import Any

from agiqa.errors import ConfigError, HeadError
from agiqa.extract import Backbone
from agiqa.extract.data.templates import VARIANTS, template_of
from agiqa.extract.filling.pooling import parse_poolings
from agiqa.extract.filling.targets import Target
from agiqa.extract.models.opening import open_checked
from agiqa.extract.models.provenance import check_model
from agiqa.extract.models.timm_backbone import BLOCKS, TAPPED_BLOCKS
from agiqa.heads import Run
from agiqa.progress import say
from agiqa.store import open_store
from agiqa.store.reading.layers import JOINED


def recorded_wording(run: Run, aspect: str | None, variant: str | None) -> tuple[str, str]:
    """The aspect and variant of the conversations that the head was trained on.

    If the run has no record of them, the given ones, or else `quality` and `id`. Raises UnknownName for an unknown
    aspect, and HeadError if a given one differs from the record.
    """
    if aspect is not None:
        template_of(aspect)
    recorded = run.origin.get("conversation", {})
    for option, given in (("aspect", aspect), ("variant", variant)):
        stated = recorded.get(option, given)
        if given is not None and given != stated:
            message = (
                f"The head {run.path} was trained on conversations of the {option} {stated}, and --{option} is "
                f"{given}. Leave --{option} out, or give a head that was trained on {given}."
            )
            raise HeadError(message)
    used = aspect or recorded.get("aspect", "quality"), variant or recorded.get("variant", "id")
    if used[1] not in VARIANTS:
        message = (
            f"The head {run.path} reads descriptions of several aspects ({used[1]}), and score writes those of one. "
            "Use `agiqa describe` for each aspect, then `agiqa extract` and `agiqa predict`."
        )
        raise HeadError(message)
    return used


def open_model_of(
    run: Run,
    model: str,
    *,
    adapter: str | None,
    dtype: str,
    device: str,
    max_slices: int | None,
    weights: str | Path | None = None,
) -> Backbone:
    """Open `model`, or the part of it that the head reads, if it is the model of the head.

    `dtype` auto and `max_slices` None stand for the recorded values. Raises HeadError if the models differ (see
    `check_model`), and what `open_backbone` raises.
    """
    recorded = run.origin.get("model", {})
    part: dict[str, Any] = {} if weights is None else {"weights": weights}
    if run.spec.tap not in (None, "timm"):
        part["tap"] = BLOCKS if run.spec.tap == TAPPED_BLOCKS else run.spec.tap
    if recorded.get("kind") == "timm":
        part["image_size"] = recorded["image"]["input_size"][-1]
    if not recorded:
        say(
            f"warning: {run.path} does not record which model made its store, so only the language-model head is "
            "compared. Make sure that model, adapter, aspect and variant are those of that store"
        )
        return open_checked(model, adapter=adapter, dtype=dtype, device=device, max_slices=max_slices, **part)
    dtype = recorded.get("dtype", dtype) if dtype == "auto" else dtype
    opened = partial(open_checked, model, adapter=adapter, dtype=dtype, device=device, **part)
    backbone = opened(max_slices=max_slices)
    found, slices = backbone.provenance(), recorded.get("image", {}).get("slices")
    if max_slices is None and slices is not None and found.get("image", {}).get("slices", slices) != slices:
        backbone = opened(max_slices=slices)
        found = {**found, "image": {**found["image"], "slices": slices}}
    for line in check_model(recorded, found, head=f"The head {run.path}"):
        say(f"warning: {line}")
    return backbone


def target_of(run: Run, basis: str | Path | None) -> Target:
    """The encoding, layers and pooled rows that the head reads; `basis` is a sketch store for a head on a sketch.

    Raises HeadError or ConfigError if the basis does not fit the head, UnknownName for a layer that it lacks.
    """
    layers, poolings = tuple(run.spec.layer.split(JOINED)), parse_poolings(run.spec.pooled)
    target = Target(encoding=run.spec.encoding, layers=layers, poolings=poolings, tap=run.spec.tap)
    if run.spec.basis_id is None:
        if basis is not None:
            message = f"--basis belongs to a head on a sketch; {run.path} reads {run.spec.encoding!r} features."
            raise ConfigError(message)
        return target
    if basis is None:
        message = (
            f"The head {run.path} reads a sketch in the basis {run.spec.basis_id}. Name a sketch store that has it, "
            "such as the one that it was trained on: --basis STORE."
        )
        raise HeadError(message)
    return target.with_bases_of(open_store(basis))
