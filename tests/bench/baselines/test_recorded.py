"""Baselines that are recorded: which a second call takes as they are, by the time stamps and bytes of what is on disk."""

import json
from dataclasses import replace

import numpy as np
import pytest

from agiqa.bench.baselines.evidence import RatingWords
from agiqa.bench.baselines.recorded import RecordedBaselines
from agiqa.heads import TrainConfig
from tests.bench.baselines.test_baselines import NAMES, make, run, talks


class Changed:
    """A store with other columns in its item table, as after `agiqa store labels`."""

    def __init__(self, store, **changes):
        self._store, self.items = store, replace(store.items, **changes)

    def __getattr__(self, name):
        return getattr(self._store, name)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make(tmp_path_factory.mktemp("recorded"))


@pytest.fixture
def fit(store, tmp_path):
    """Fits all baselines in tmp_path/out, whose recorded lines it reads first; returns the lines and the time stamps."""
    words = talks(store, tmp_path / "quality_words.json", lambda k: ["bad", "good", "fair"][k % 3])
    (tmp_path / "out").mkdir()

    def fitted(source=store, *configs, words=words, **options):
        recorded = RecordedBaselines(tmp_path / "out" / "baselines.jsonl")
        lines = run(source, tmp_path / "out", *configs, words=[words], recorded=recorded, **options)
        files = {name: tmp_path / "out" / line["predictions"] for name, line in lines.items()}
        return lines, {name: path.stat().st_mtime_ns for name, path in files.items()}

    return fitted


def fitted_again(before, after):
    return {name for name in after[1] if after[1][name] != before[1].get(name)}


def test_a_second_call_changes_no_byte(fit, tmp_path):
    first = fit()
    recorded = (tmp_path / "out" / "baselines.jsonl").read_bytes()
    assert fit() == first
    assert (tmp_path / "out" / "baselines.jsonl").read_bytes() == recorded
    assert set(first[0]) == set(NAMES)


def test_what_a_baseline_reads_decides_whether_it_is_fitted_again(fit, store, tmp_path):
    first = fit()
    texts = [text.replace("good", "fine") for text in store.items.descriptions]
    assert fitted_again(first, fit(Changed(store, descriptions=texts))) == set(NAMES)
    assert fitted_again(fit(), fit()) == set()
    other = talks(store, tmp_path / "quality_other.json", lambda k: "good")
    assert fitted_again(fit(), fit(words=other)) == {"rating word"}
    mos = store.items.labels["quality"].copy()
    mos[np.flatnonzero(np.array(store.items.splits) == "train")[0]] += 1.0
    assert fitted_again(first, fit(Changed(store, labels={"quality": mos}))) == set(NAMES)
    assert fitted_again(fit(), fit(no_kernel="none is wanted")) == {"features"}
    assert fitted_again(first, fit(store, TrainConfig(training_items=20))) == set(NAMES)


def test_a_csv_that_is_not_what_it_was_is_fitted_again(fit, tmp_path):
    first = fit()
    (tmp_path / "out" / first[0]["prompt"]["predictions"]).write_text("name,prompt\n")
    (tmp_path / "out" / first[0]["text"]["predictions"]).unlink()
    again = fit()
    assert fitted_again(first, again) == {"prompt", "text"}
    assert {name: line["test"] for name, line in again[0].items()} == {
        name: line["test"] for name, line in first[0].items()
    }


def test_lines_that_are_torn_or_of_an_older_agiqa_are_fitted_again(fit, tmp_path):
    first, path = fit(), tmp_path / "out" / "baselines.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    older = [{key: value for key, value in line.items() if key != "fitted"} for line in lines[:2]]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*older, *lines[2:]])[:-20])
    again = fit()
    assert fitted_again(first, again) == {NAMES[0], NAMES[1], NAMES[-1]}
    assert len(RatingWords([tmp_path / "quality_words.json"]).digest) == 64
