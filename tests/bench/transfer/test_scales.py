"""A transfer between data sets whose MOS are on different scales and whose texts have different authors."""

import json
from dataclasses import replace

import numpy as np
import pytest
import yaml

from agiqa.bench.recording.predictions import read_predictions
from agiqa.bench.transfer.plan import read_transfer_settings
from agiqa.bench.transfer.transfer import run_transfer
from tests.store.conftest import make_content, make_store

FIVE, HUNDRED = (0.0, 5.0), (0.0, 100.0)
COUNT = 32


def store_of(path, scale, *, seed):
    """Items whose MOS, in shares of `scale`, follow their first channel."""
    content = make_content([3] * COUNT, width=4, vocabulary=9, seed=0, logical_dtype="float32")
    drawn = make_content([3] * COUNT, width=4, vocabulary=9, seed=seed, logical_dtype="float32")
    low, high = scale
    shares = np.clip([0.5 + rows.view(np.float32)[:, 0].mean() / 8 for rows in drawn.hidden], 0, 1)
    items = replace(
        drawn.items,
        names=[f"{seed}/{name}" for name in drawn.items.names],
        prompts=[f"{seed} {prompt}" for prompt in drawn.items.prompts],
        labels={"quality": low + shares * (high - low)},
        mos_ranges={"quality": scale},
        text_authors=["teacher" if seed == 2 else "model"] * COUNT,
    )
    return make_store(path, replace(drawn, items=items, lm_head=content.lm_head), data_set={"name": path.stem})


@pytest.fixture(scope="module")
def transfers(tmp_path_factory):
    """From a data set on 0 to 5 to one on 0 to 5, and to the same on 0 to 100."""
    folder = tmp_path_factory.mktemp("transfer")
    config = folder / "transfer.yaml"
    head = {"projection": "hidden", "encoder": "none", "width": 8}
    config.write_text(yaml.safe_dump({"head": head, "train": {"epochs": 8, "lr": 0.01, "device": "cpu"}}))
    first, said, done = store_of(folder / "a.agiqa", FIVE, seed=1), [], {}
    for scale in (FIVE, HUNDRED):
        stores = {"a": first, "b": store_of(folder / f"b{scale[1]:g}.agiqa", scale, seed=2)}
        out, settings = folder / f"out{scale[1]:g}", read_transfer_settings(config)
        done[scale] = run_transfer(stores, settings, out, seeds=1, shots=(), workers=1, tell=said.append), out
    return done, said


def test_predictions_on_another_scale_are_those_on_the_same_converted(transfers):
    done, said = transfers
    assert all(transfer.failed == {} for transfer, _ in done.values())
    assert sum("different scales of MOS" in line and "from 0 to 5 to 0 to 100" in line for line in said) == 1
    for pair in zip(done[FIVE][0].rows, done[HUNDRED][0].rows, strict=True):
        same, scaled = pair
        factor = 20 if same["store_name"] == "b" else 1
        for metric, times in [("srcc", 1), ("plcc", 1), ("krcc", 1), ("rmse", factor)]:
            expected = pytest.approx(same["test"][metric] * times, rel=1e-3, abs=1e-3)
            assert scaled["test"][metric] == expected, same["row"]
    applied = [row for row in done[HUNDRED][0].rows if row["settings"]["way"] == "apply"]
    assert {row["store_name"]: row["test"]["rmse"] < 30 for row in applied} == {"a": True, "b": True}


def test_truth_and_predictions_are_written_on_the_scale_of_the_target(transfers):
    done, _ = transfers
    same, scaled = ({path.name: path for path in (out / "predictions").iterdir()} for _, out in done.values())
    assert len(same) == len(scaled) == 2
    for name in same:
        ours, theirs = (read_predictions(paths[name], ("quality",), "quality") for paths in (same, scaled))
        factor = 20 if ours.names[0].startswith("2/") else 1
        np.testing.assert_allclose(theirs.mos, ours.mos * factor, rtol=1e-6)
        np.testing.assert_allclose(theirs.predicted, ours.predicted * factor, rtol=1e-3, atol=1e-3)


def test_texts_of_a_teacher_are_told_and_stand_in_the_lines_of_what_was_applied(transfers):
    done, said = transfers
    told = [line for line in said if "read the text of a teacher" in line]
    assert all(line.startswith("warning: b: ") for line in told)
    assert sum(" test items" in line for line in told) == len(done)
    for _, out in done.values():
        lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
        applied = {line["to"]: line for line in lines if line["way"] == "apply"}
        assert applied["b"]["text_authors"] == {"test": {"teacher": COUNT // 4}}
        assert applied["a"]["text_authors"] == {"test": {"model": COUNT // 4}}
        spoiled = [any("rating word included" in one for one in applied[name]["warnings"]) for name in "ab"]
        assert spoiled == [False, True]


def test_warnings_of_trained_heads_are_told_once_for_all_of_them(transfers):
    """By each of the two transfers."""
    few = [line for line in transfers[1] if "too few to choose an epoch by" in line]
    assert len(few) == 2
    assert all(line.startswith("warning: 2 of 6 heads (from=a,to=a,way=within,") for line in few)
