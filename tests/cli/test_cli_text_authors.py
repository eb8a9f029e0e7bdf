"""Commands report who wrote the texts, before a model runs and with every score."""

import json

import pytest

from tests.cli.conftest import SMALL_HEAD
from tests.extract.small_sets import read_table, write_table

ITEMS = 24


@pytest.fixture
def data(tmp_path):
    rows = [[f"{k}.png", f"thing {k}", k % 5 + 0.5] for k in range(ITEMS)]
    return write_table(tmp_path / "set", rows, ["name", "prompt", "mos_quality"])


def write_talks(data, name, rows, **more):
    """Conversations whose rating word reveals the MOS, as if by a teacher that knew it."""
    words = ("bad", "poor", "fair", "good", "excellent")
    entries = [
        {
            "id": row["name"],
            "image": f"set/images/{row['name']}",
            "conversations": [
                {"role": role, "content": text}
                for role, text in zip(
                    ("user", "assistant", "user", "assistant"),
                    (f"Describe {row['prompt']}.", "A thing.", "Rate it.", words[int(float(row["mos_quality"]))]),
                    strict=True,
                )
            ],
            **more,
        }
        for row in rows
    ]
    (data / name).write_text(json.dumps(entries))
    return data / name


def extract(agiqa, data, store, model, *files, **options):
    given = [part for file in files for part in ("--conversations", file)]
    more = [part for name, value in options.items() for part in (f"--{name}", value)]
    return agiqa("extract", data, store, "--model", model, "--device", "cpu", "--prepare-workers", 0, *given, *more)


def test_a_test_file_without_the_models_own_answers(agiqa, data, tiny_text_checkpoint, tmp_path):
    rows, store, run = read_table(data), tmp_path / "s.agiqa", tmp_path / "run"
    files = [write_talks(data, "quality_train.json", rows[:16]), write_talks(data, "quality_test.json", rows[16:])]
    extracted = extract(agiqa, data, store, tiny_text_checkpoint, *files, variant="full")
    warning = "warning: 8 of 8 test items read the text of a teacher that knew their MOS, its rating word included"
    assert extracted.code == 0
    assert extracted.err.index(warning) < extracted.err.index("extract:")
    assert "text authors train: teacher (16); test: teacher (8)" in " ".join(agiqa("store", "info", store).out.split())
    assert agiqa("store", "info", store, "--json").json["text_authors"] == {
        "train": {"teacher": 16},
        "test": {"teacher": 8},
    }
    trained = agiqa("train", store, run, *SMALL_HEAD)
    assert warning in trained.err
    recorded = json.loads((run / "metrics.json").read_text())["warnings"]
    assert any(f"warning: {line}".startswith(warning) for line in recorded)
    assert warning in agiqa("evaluate", run, store).err


def test_a_part_called_val_is_told_before_the_model_runs(agiqa, data, tiny_text_checkpoint, tmp_path):
    rows, own = read_table(data), {"response_0": "A thing.", "response_1": "fair"}
    train = write_talks(data, "answers_train_quality.json", rows[:16])
    held = write_talks(data, "answers_val_quality_partial_on_quality_lora.json", rows[16:], **own)
    told = extract(agiqa, data, tmp_path / "a.agiqa", tiny_text_checkpoint, train, held)
    assert f"--conversations test={held}" in told.err.partition("plan:")[0]
    failed = agiqa("train", tmp_path / "a.agiqa", tmp_path / "run", *SMALL_HEAD)
    assert failed.code == 1
    assert "train (16), val (8)" in failed.err
    assert "--conversations test=FILE" in failed.err
    mended = extract(agiqa, data, tmp_path / "b.agiqa", tiny_text_checkpoint, train, f"test={held}")
    assert "warning" not in mended.err
    trained = agiqa("train", tmp_path / "b.agiqa", tmp_path / "run", *SMALL_HEAD, "--json")
    assert trained.json["test"]["n"] == 8
    assert "validation items read the text of a teacher that knew their MOS, without its rating word" in trained.err
