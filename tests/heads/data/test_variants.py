"""Heads on stores that are read as shorter conversations have the numbers of heads on stores of these conversations."""

import numpy as np
import pytest

from agiqa.errors import ConfigError, ViewRefused
from agiqa.heads import HeadConfig, HeadJob, TrainConfig, evaluate, load_run, predict, train_head, train_heads
from agiqa.heads.data.reopening import SourceAddress
from agiqa.heads.data.variants import as_variant
from agiqa.store import Prefixes, union
from tests.heads.layered_stores import made_roles, made_states, mos_of, write_store

LAYERS = ("8", "last")
STATES = made_states(layers=LAYERS)
COUNT = len(STATES["last"])
CUTS = {"question": [1] * COUNT, "id": [len(rows) - 1 for rows in STATES["last"]]}
HEAD = HeadConfig(projection="hidden", encoder="gru", pooling="mean", width=4)
TRAIN = TrainConfig(epochs=2, batch_size=16, device="cpu", threads=1)
MOS = mos_of(STATES["last"])
TEACHER, MODEL = 1, 3


def cut(rows, name):
    return [one[:length] for one, length in zip(rows, CUTS[name], strict=True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("variants")


@pytest.fixture(scope="module")
def full(folder):
    authors = np.tile(np.array([0, MODEL], np.uint8), (COUNT, 1))
    prefixes = Prefixes(names=tuple(CUTS), rows=np.array([*CUTS.values()], np.int32).T.copy(), authors=authors)
    texts = ["teacher"] * COUNT
    return write_store(folder / "full.agiqa", STATES, MOS, variant="full", prefixes=prefixes, authors=texts)


@pytest.fixture(scope="module")
def shorter(folder):
    """The stores of the shorter conversations, written on their own."""
    return {
        name: write_store(
            folder / f"{name}.agiqa",
            {layer: cut(rows, name) for layer, rows in STATES.items()},
            MOS,
            variant=name,
            roles=cut(made_roles(), name),
        )
        for name in CUTS
    }


@pytest.mark.parametrize("layer", ["last", "8", "8+last"])
@pytest.mark.parametrize("name", CUTS)
def test_a_head_on_a_view_is_the_head_on_a_separate_store(name, layer, full, shorter, tmp_path):
    here = train_head(
        full, tmp_path / "view", head=HEAD, train=TRAIN.model_copy(update={"variant": name, "layer": layer})
    )
    there = train_head(shorter[name], tmp_path / "own", head=HEAD, train=TRAIN.model_copy(update={"layer": layer}))
    assert here.predictions == there.predictions
    np.testing.assert_array_equal(predict(here, full), predict(there, shorter[name]))
    np.testing.assert_array_equal(predict(here, shorter[name]), predict(here, full))


def test_a_run_records_its_variant_and_is_evaluated_on_it(full, shorter, tmp_path):
    train_head(full, tmp_path / "run", head=HEAD, train=TRAIN.model_copy(update={"variant": "id"}))
    run = load_run(tmp_path / "run")
    assert (run.train.variant, run.origin["conversation"]["variant"]) == ("id", "id")
    assert run.store_id == full.variant("id").id
    scores = evaluate(run, full)
    assert scores["srcc"] == run.metrics["test"]["srcc"] == run.evaluate(shorter["id"])["srcc"]
    other = evaluate(run, full, variant="question")
    assert other["srcc"] == evaluate(run, shorter["question"], variant="question")["srcc"] != scores["srcc"]
    with pytest.raises(ViewRefused, match="do not begin with those of 'id'"):
        evaluate(run, shorter["question"])


def test_warnings_are_about_the_texts_of_the_view(full, tmp_path):
    whole = train_head(full, tmp_path / "full", head=HEAD, train=TRAIN)
    assert any("rating word included" in line for line in whole.metrics["warnings"])
    view = train_head(full, tmp_path / "id", head=HEAD, train=TRAIN.model_copy(update={"variant": "id"}))
    assert not any("teacher" in line for line in [*view.metrics["warnings"], *view.metrics["notes"]])
    assert view.metrics["text_authors"]["test"] == {"model": len(view.parts().pairs["test"])}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_sweep_reads_each_variant(workers, full, tmp_path):
    jobs = [
        HeadJob(run=tmp_path / f"{name}", head=HEAD, train=TRAIN.model_copy(update={"variant": name, "epochs": 1}))
        for name in (None, *CUTS)
    ]
    ended = {one.job.run.name: one.load() for one in train_heads(full, jobs, workers=workers)}
    for job in jobs:
        alone = train_head(full, tmp_path / "alone" / job.run.name, head=job.head, train=job.train)
        assert alone.predictions == ended[job.run.name].predictions
    assert all(one.status == "there" for one in train_heads(full, jobs, workers=1))
    wrong = HeadJob(run=jobs[1].run, head=HEAD, train=jobs[2].train)
    (refused,) = train_heads(full, [wrong], workers=1)
    assert "holds another training" in (refused.error or "")


def test_unions_and_other_processes_read_views(full):
    view = union([full]).variant("id")
    again = SourceAddress.of(view).open()
    assert again.id == view.id
    np.testing.assert_array_equal(again.read([3, 1]).rows, view.read([3, 1]).rows)
    one = SourceAddress.of(full.variant("question")).open()
    assert one.id == full.variant("question").id


def test_sources_without_conversations_have_no_variants(make_store, tmp_path):
    source = make_store()
    assert as_variant(source, None) is source
    with pytest.raises(ConfigError, match="has no conversations to read as the variant 'id'"):
        train_head(source, tmp_path / "run", head=HEAD, train=TRAIN.model_copy(update={"variant": "id"}))
