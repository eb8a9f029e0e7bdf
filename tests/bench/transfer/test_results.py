"""What a transfer leaves behind: rows held to their own computation from predictions, and lines read again."""

import json

import numpy as np
import pytest
import yaml

from agiqa.bench.recording.predictions import write_predictions
from agiqa.bench.recording.result_folders import ABOUT, RESULTS
from agiqa.bench.transfer.plan import plan_transfer, read_transfer_settings
from agiqa.bench.transfer.results import open_results, table_rows
from agiqa.errors import DataError
from agiqa.heads.evaluation.metrics import paired, seeds_score
from agiqa.heads.evaluation.significance import holm

ITEMS = 40
PROMPTS = [f"prompt {k // 4}" for k in range(ITEMS)]
NAMES = [f"{k:02d}.png" for k in range(ITEMS)]
MOS = np.random.default_rng(0).uniform(0, 5, (ITEMS, 2))
LABELS = ("beauty", "quality")


@pytest.fixture
def settings(tmp_path):
    file = tmp_path / "transfer.yaml"
    file.write_text(yaml.safe_dump({"train": {"label": "+".join(LABELS)}}))
    return read_transfer_settings(file)


@pytest.fixture
def plan(settings):
    return plan_transfer(("a", "b"), settings, seeds=2, shots=(10,))


@pytest.fixture
def about(settings):
    return {"kind": "transfer", "stores": {"a": {"id": "1"}, "b": {"id": "2"}}, "settings": settings.record()}


@pytest.fixture
def results(tmp_path, plan, about):
    """All lines, with predictions of their own for every head and data set."""
    out = open_results(tmp_path, about, plan)
    for number, line in enumerate(plan.lines):
        path = f"predictions/{line.head} on {line.target}.csv"
        write_predictions(tmp_path / path, LABELS, NAMES, PROMPTS, MOS, MOS + noise(line))
        both = {label: {"srcc": number / 100, "plcc": 0.5} for label in LABELS}
        facts = {"seed": line.seed, "seconds": 1.0, "predictions": path, "config": {"label": "beauty+quality"}}
        out.append({"name": line.name, **facts, "validation": both if line.way == "within" else None})
    return out


def noise(line):
    text = f"{line.head} on {line.target}"
    return np.random.default_rng(list(text.encode())).normal(size=(ITEMS, 2)) * 2


def of_row(plan, row, column):
    """(seeds, items)."""
    return np.stack([MOS[:, column] + noise(line)[:, column] for line in plan.lines if line.row == row])


def test_rows_have_the_scores_and_differences_of_their_predictions(tmp_path, plan, results):
    rows = table_rows(plan, results.lines, tmp_path, protocol="published", label="beauty+quality")
    assert len(rows) == 2 * 2 * (3 + 2 * 2)
    for row in rows:
        column = LABELS.index(row["label"])
        assert row["test"] == seeds_score(of_row(plan, row["row"], column), MOS[:, column], PROMPTS)
        other = {"tp": "apply", "warm": "fresh"}.get(row["settings"]["way"])
        assert (row["against"] is None) == (other is None)
        if other is not None:
            reference = row["row"].replace(f"way={row['settings']['way']}", f"way={other}")
            expected = paired(
                *(of_row(plan, name, column) for name in (row["row"], reference)),
                MOS[:, column],
                PROMPTS,
            )
            assert row["against"] == {"row": reference, **expected, "p_holm": row["against"]["p_holm"]}
    for label in LABELS:
        compared = [row["against"] for row in rows if row["label"] == label and row["against"]]
        assert [one["p_holm"]["srcc"] for one in compared] == holm([one["p"]["srcc"] for one in compared])


def test_only_heads_with_validation_items_tell_of_them(tmp_path, plan, results):
    rows = table_rows(plan, results.lines, tmp_path, protocol="published", label="beauty+quality")
    assert {row["settings"]["way"] for row in rows if row["validation"]} == {"within"}
    assert rows[0]["validation"]["srcc"] == [0.005, pytest.approx(np.std([0, 0.01], ddof=1))]
    assert rows[0]["validation"]["plcc"] == [0.5, 0.0]


def test_seeds_that_failed_are_counted_and_left_out(tmp_path, plan, results):
    applied = [line for line in plan.lines if line.way == "apply" and line.source == "a"]
    results.append({"name": applied[1].name, "error": "out of memory"})
    made = table_rows(plan, results.lines, tmp_path, protocol="published", label="beauty+quality")
    rows = {(row["row"], row["label"]): row for row in made}
    row = rows[applied[0].row, "quality"]
    assert (row["runs"], row["seeds"], row["failed"], row["test"]["seeds"]) == (2, 1, 1, 1)


def test_predictions_of_other_items_are_not_put_together(tmp_path, plan, results):
    path = tmp_path / results.lines[plan.lines[1].name]["predictions"]
    write_predictions(path, LABELS, [f"other {name}" for name in NAMES], PROMPTS, MOS, MOS)
    with pytest.raises(DataError, match=f"{plan.lines[0].name}.*{plan.lines[1].name}.* on different items"):
        table_rows(plan, results.lines, tmp_path, protocol="published", label="beauty+quality")


def test_lines_are_read_again_without_what_a_kill_tore_off(tmp_path, plan, about, results):
    whole = (tmp_path / RESULTS).read_bytes()
    (tmp_path / RESULTS).write_bytes(whole + b'{"name": "from')
    again = open_results(tmp_path, about, plan)
    assert again.lines == results.lines
    assert all(again.is_done(line.name) for line in plan.lines)
    assert (tmp_path / RESULTS).read_bytes() == whole


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"name": ["x"]}\n', "line 1 is no result line of a transfer"),
        (b"3\n", "line 1 is no result line of a transfer"),
        (b"\xff\n", "is no file of result lines"),
    ],
)
def test_lines_of_something_else_are_refused(tmp_path, plan, about, line, said):
    (tmp_path / RESULTS).write_bytes(line)
    with pytest.raises(DataError) as caught:
        open_results(tmp_path, about, plan)
    assert said in str(caught.value)
    assert not (tmp_path / ABOUT).exists()


def test_settings_that_an_older_agiqa_did_not_know_have_their_defaults(tmp_path, plan, about):
    old = json.loads(json.dumps(about))
    for section in ("train", "few_shot"):
        del old["settings"][section]["training_seed"]
    (tmp_path / ABOUT).write_text(json.dumps(old))
    assert open_results(tmp_path, about, plan).lines == {}
    old["settings"]["train"]["epochs"] += 1
    (tmp_path / ABOUT).write_text(json.dumps(old))
    with pytest.raises(DataError, match=r"about\.json is of another transfer"):
        open_results(tmp_path, about, plan)


def test_a_transfer_is_gone_on_with_on_another_machine(tmp_path, plan, about):
    """Threads are no part of the settings, also if a line of an older agiqa records them."""
    old = json.loads(json.dumps(about))
    assert "threads" not in old["settings"]["train"]
    old["settings"]["train"]["threads"] = 7
    (tmp_path / ABOUT).write_text(json.dumps(old))
    assert open_results(tmp_path, about, plan).lines == {}
