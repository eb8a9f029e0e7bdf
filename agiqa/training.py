"""Phase 2 in one call: from a store to a trained and evaluated head."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from agiqa.extract.data.templates import aspects_of, label_of
from agiqa.heads import (
    FeatureSource,
    HeadConfig,
    Run,
    TrainConfig,
    TrainingProgress,
    load_run,
    load_settings,
    train_head,
    training_progress,
)
from agiqa.heads.data.features import location_of
from agiqa.heads.data.variants import as_variant
from agiqa.heads.model.reading import default_settings_of, usual_settings
from agiqa.heads.settings.form_settings import unread_by_forms
from agiqa.progress import say
from agiqa.store import AnyStore, Store, open_store, union


def train(
    store: str | Path | FeatureSource,
    run: str | Path,
    *,
    also: str | Path | Store | Sequence[str | Path | Store] = (),
    config: str | Path | None = None,
    preset: str | None = None,
    start: str | Path | Run | None = None,
    restart: bool = False,
    progress: TrainingProgress | None = None,
    **settings: Any,
) -> Run:
    """Train a head on `store` and write the folder `run`: weights, config, metrics, predictions and curves.

    `store` is a path, a URL or an open store; `also` is a further one to train on, or several. `settings` are those of
    `agiqa.heads.HeadConfig` and `agiqa.heads.TrainConfig`, such as `encoder="gru"` and `layer="16"`; `config` is a YAML
    file with the sections `head` and `train`, and `preset` is `paper` or `published`. `start` is a run to start from,
    with its settings and weights. The first of settings, `config`, `start` and `preset` that gives a setting decides.
    Without a setting that asks for a network, such as `epochs`, the head is a `stack` of closed forms.
    An interrupted training resumes; `restart` discards its saved state. `progress` shows the training, by default on
    the error stream or below the cell of a notebook.

    The epoch is chosen on validation items; the test part is read once, at the end. Warnings and notes go to the error
    stream. Raises as `agiqa.heads.load_settings` and `agiqa.heads.train_head`.
    """
    source = _opened(store)
    further = [also] if isinstance(also, str | Path | Store) else also
    if further:
        source = union([_store(one) for one in (store, *further)])
    first = start if start is None or isinstance(start, Run) else load_run(start)
    head, training = load_settings(
        None if config is None else Path(config),
        settings,
        preset=preset,
        start=None if first is None else first.head,
        usual=default_settings_of(source) if first is None else lambda given: _of_start(source, first, given),
    )
    _say_unread(settings, head)
    source = as_variant(source, training.variant)
    _warn_of_other_questions(source, training)
    trained = train_head(
        source,
        run,
        head=head,
        train=training,
        progress=progress or training_progress(Console(stderr=True)),
        preset=preset,
        restart=restart,
        start=first,
    )
    for warning in trained.metrics["warnings"]:
        say(f"warning: {warning}")
    for note in trained.metrics["notes"]:
        say(f"note: {note}")
    return trained


def _opened(store: str | Path | FeatureSource) -> FeatureSource:
    return open_store(store) if isinstance(store, str | Path) else store


def _of_start(source: FeatureSource, start: Run, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `usual_settings` of a training that starts from a run, whose layer it reads."""
    of_start = {"layer": start.spec.layer}
    return {**usual_settings(source)({**of_start, **given}), **of_start}


def _store(store: str | Path | FeatureSource) -> AnyStore:
    """A store to be read as one with others. Raises TypeError for another source of features."""
    source = _opened(store)
    if not isinstance(source, AnyStore):
        message = f"`also` joins stores, and {location_of(source)} is a {type(source).__name__}."
        raise TypeError(message)
    return source


def _say_unread(settings: Mapping[str, Any], head: HeadConfig) -> None:
    """Name the settings given without effect: a network reads none of closed forms alone, and the reverse."""
    unread = unread_by_forms(head)
    for name in (name for name, value in settings.items() if value is not None and name in unread):
        say(f"note: {unread[name]} does not read `{name}`, which has no effect")


def _warn_of_other_questions(source: FeatureSource, training: TrainConfig) -> None:
    """Say so where the conversations of the store ask for other labels than the head learns."""
    provenance: dict[str, Any] = getattr(source, "provenance", {})
    conversation = provenance.get("conversation", {})
    if conversation.get("aspect") is None:
        return
    asked = [*map(label_of, aspects_of(conversation["variant"], conversation["aspect"]))]
    if not {*training.labels} <= {*asked}:
        learned = " and ".join(training.labels)
        say(
            f"warning: the conversations of {location_of(source)} ask for {' and '.join(asked)}, and the head learns "
            f"{learned}"
        )
