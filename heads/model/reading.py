"""Which features of a store a head reads, by its settings, and the settings that a store has by default."""

from collections.abc import Mapping
from typing import Any

from agiqa.errors import ConfigError, HeadError, UnknownName
from agiqa.heads.data.features import FeatureSource, location_of
from agiqa.heads.data.layers import (
    JOINER,
    PooledRow,
    base_of,
    layer_of,
    pooled_rows,
    provenance_of,
    read_layer,
    spread_layers,
    stored_layers,
)
from agiqa.heads.model.encoders import ENCODERS
from agiqa.heads.model.pooling import PoolingName
from agiqa.heads.model.projection import FeatureSpec, usual_projection
from agiqa.heads.settings.config import HeadConfig, Usual
from agiqa.heads.settings.form_settings import asks_for_network

_DEFAULT = "stack"
"""The encoder of `agiqa train` by default; bench/LOG.md has the comparison ("Which head by default")."""
_ON_LAYERS = ("ridge", "krr", _DEFAULT)
"""Closed forms that predict better from several layers side by side than from the last one."""
_LOGITS = "logits"
_ONE_ROW = "none"
"""The encoder of stores of pooled rows by default."""
_OF_SEQUENCES = "attention"
"""The pooling by default where another encoder reads pooled rows as a sequence: it begins as their mean."""
_PREFERRED = ("mean@answer", "mean")
_LINEAR = ("mean", "first", "last")
"""Poolings of projected tokens that are the projection of pooled tokens."""


def reads_one_row(encoder: str) -> bool:
    """Whether a head of this encoder reads a single pooled row of each item, as it does not mix tokens."""
    return not getattr(ENCODERS.get(encoder), "mixes_tokens", True)


def usual_pooling(pooled: tuple[str, ...]) -> str:
    """The pooling by default of a store with these rows: `mean@answer`, else `mean`, else the first."""
    return next((name for name in _PREFERRED if name in pooled), pooled[0])


def usual_settings(*sources: FeatureSource) -> Usual:
    """The settings by default of heads that read all of `sources`, which depend on the layer and the encoder given.

    The projection is `usual_projection`. Heads on pooled rows have the encoder `none` and `usual_pooling`; with another
    encoder the pooling is `attention`, over all rows. Closed forms read the `spread_layers`.
    """

    def usual(given: Mapping[str, Any]) -> dict[str, Any]:
        layer, found = given.get("layer"), dict[str, Any]()
        if layer is None and given.get("encoder") in _ON_LAYERS:
            spread = spread_layers(*(stored_layers(base_of(source)) for source in sources))
            if JOINER in spread:
                layer = found["layer"] = spread
        read = [read_layer(source, None if layer is None else str(layer)) for source in sources]
        projection = usual_projection(*read)
        if projection is not None:
            found["projection"] = projection
        pooled = {pooled_rows(source) for source in read}
        if () not in pooled:
            encoder = str(given.get("encoder", _ONE_ROW))
            shared = tuple(name for name in next(iter(pooled)) if all(name in rows for rows in pooled))
            found["encoder"] = encoder
            if shared and encoder in ENCODERS:
                found["pooling"] = usual_pooling(shared) if reads_one_row(encoder) else _OF_SEQUENCES
        return found

    return usual


def default_settings_of(source: FeatureSource) -> Usual:
    """The settings of `agiqa train` by default: a stack of closed forms, as `usual_settings` gives it.

    A network is trained where the settings given ask for one, and on stored logits, whose vectors are long.
    """
    usual = usual_settings(source)

    def of(given: Mapping[str, Any]) -> dict[str, Any]:
        if given.get("encoder") is not None or source.encoding == _LOGITS or asks_for_network(given):
            return {**usual(given)}
        return {"encoder": _DEFAULT, **usual({**given, "encoder": _DEFAULT})}

    return of


def features_for(source: FeatureSource, head: HeadConfig, layer: str | None) -> FeatureSource:
    """What a head with these settings reads of `source`: the layer, and the pooled row that its pooling names.

    Encoders that mix tokens read all pooled rows of an item as a sequence. Raises as `read_layer`, UnknownName for an
    encoder or a pooling that is not registered, and HeadError for a pooling that a store of pooled rows lacks. A closed
    form finds its rows itself.
    """
    read = read_layer(source, layer)
    pooled = pooled_rows(read)
    if not pooled or head.is_closed:
        return read
    one_row, name = reads_one_row(head.encoder), PoolingName.parse(head.pooling)
    if head.pooling in pooled:
        return PooledRow.of(read, head.pooling) if one_row else read
    if one_row or name.role is not None:
        close = UnknownName.of(f"pooled row of {location_of(source)}", head.pooling, pooled)
        message = (
            f"{close} This store holds pooled rows instead of tokens: choose one of them, or extract again with "
            f"`agiqa extract --pool-tokens {','.join([*pooled, head.pooling])}`."
        )
        raise HeadError(message)
    return read


def reading_notes(source: FeatureSource, head: HeadConfig) -> list[str]:
    """A note where an encoder reads pooled rows as a sequence; `source` is from `features_for`."""
    pooled = pooled_rows(source)
    if not pooled or head.is_closed or reads_one_row(head.encoder):
        return []
    rows = f"{len(pooled)} pooled row{'s' * (len(pooled) > 1)}"
    return [
        f"the encoder {head.encoder!r} reads the {rows} of each item ({', '.join(pooled)}) as a sequence; "
        "`--encoder none` reads one row"
    ]


def mismatch(head: HeadConfig, expected: FeatureSpec, found: FeatureSpec) -> str | None:
    """Why a head for features `expected` cannot read features `found`; None where it can."""
    if (found.tap, found.layer) != (expected.tap, expected.layer):
        there, here = (
            f"layer {spec.layer}{f' of the tap {spec.tap}' if spec.tap else ''}" for spec in (expected, found)
        )
        return f"it was trained on {there}, and the features are those of {here}. Extract that layer."
    if found.encoding != expected.encoding:
        return (
            f"it reads {expected.encoding!r} features, and the store holds {found.encoding!r}. "
            f"A sketch of hidden states is made with `agiqa store sketch STORE OUT --basis TRAINED_STORE`."
        )
    if found.basis_id != expected.basis_id:
        return (
            f"it was trained on the sketch basis {expected.basis_id}, and the store has {found.basis_id}. Sketch "
            f"the hidden store anew in the same basis: `agiqa store sketch STORE OUT --basis TRAINED_STORE`."
        )
    if "" not in (found.lm_head_sha256, expected.lm_head_sha256) and found.lm_head_sha256 != expected.lm_head_sha256:
        return (
            f"it was trained with the language-model head {expected.lm_head_sha256}, and the store has "
            f"{found.lm_head_sha256}. Extract with the same model, or train a head on this store."
        )
    if found.width != expected.width:
        return f"features have width {found.width}, expected {expected.width}."
    if not rows_are_alike(head, expected, found):
        return f"it was trained on {rows_text(expected)}, and the store holds {rows_text(found)}."
    return None


def other_model(expected: FeatureSpec, recorded: Mapping[str, Any], source: FeatureSource) -> str | None:
    """Why `source` has features of another model than the one `recorded` by a run on features `expected`.

    None where W_lm tells the models, and where one of them is unknown. Of models with files the bytes count, else the
    names.
    """
    found: Mapping[str, Any] = provenance_of(source).get("model") or {}
    if "" not in (expected.lm_head_sha256, source.lm_head_sha256) or not (recorded and found):
        return None
    by = "files" if recorded.get("files") and found.get("files") else "name"
    if recorded.get(by) == found.get(by):
        return None
    return (
        f"it was trained on features of the model {recorded.get('name')}, and the store has those of "
        f"{found.get('name')}. Extract with the same model, or train a head on this store."
    )


def rows_are_alike(head: HeadConfig, expected: FeatureSpec, found: FeatureSpec) -> bool:
    """Whether rows as of `expected` and of `found`, tokens or pooled rows, mean the same to a head.

    Without an encoder, the mean of projected tokens is the projection of their mean: such a head reads tokens and
    pooled rows alike. A closed form pools tokens itself, as the extraction of pooled rows does.
    """
    one_is_tokens = not (expected.pooled and found.pooled)
    if head.is_closed:
        return one_is_tokens or expected.pooled == found.pooled
    kind = PoolingName.parse(head.pooling).pooling
    return expected.pooled == found.pooled or (one_is_tokens and reads_one_row(head.encoder) and kind in _LINEAR)


def rows_text(spec: FeatureSpec) -> str:
    """`tokens`, or the names of the pooled rows."""
    return f"the pooled rows {', '.join(spec.pooled)}" if spec.pooled else "tokens"


def check_mix(source: FeatureSource, head: HeadConfig) -> None:
    """Raise ConfigError where the layers of `source` cannot be summed with weights, as the setting `layer_mix` says."""
    spec = FeatureSpec.of(source)
    if head.layer_mix != "softmax" or len(spec.widths) < 2:
        return
    message = None
    if spec.encoding == "sketch":
        message = "sketches of layers have bases of their own, so that a sum of their coordinates means nothing"
    elif len(set(spec.widths)) > 1:
        message = f"layers {layer_of(source)} have the widths {', '.join(map(str, spec.widths))}"
    if message is not None:
        text = f"`layer_mix` is 'softmax', which sums layers, and {message}. Take 'concat'."
        raise ConfigError(text)
