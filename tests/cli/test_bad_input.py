"""Bad input, one kind at a time: one clear message, exit 1, and no store or run that could be taken for a good one."""

import csv
import json
import shutil

import numpy as np
import pytest

from tests.cli.conftest import SMALL_HEAD
from tests.extract import tiny_models
from tests.extract.small_sets import COLUMNS, read_table, save_noise, write_set, write_table, write_talks
from tests.store.conftest import make_content, make_store


def refuse(outcome, *mentions):
    """The outcome is a failure with one message, which mentions all of `mentions`."""
    assert outcome.code == 1, (outcome.out, outcome.err)
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    assert sum(line.startswith(("error:", "Error:")) for line in outcome.err.splitlines()) == 1
    for mention in mentions:
        assert str(mention) in outcome.err


@pytest.fixture
def pictures(tmp_path):
    return write_set(tmp_path / "pictures", 6, images=True)


@pytest.fixture
def texts(tmp_path):
    return write_set(tmp_path / "texts", 6)


@pytest.fixture
def new(tmp_path):
    """Where no store may be after a refusal."""
    return tmp_path / "new.agiqa"


def extract(agiqa, data, store, model, *options):
    return agiqa("extract", data, store, "--model", model, "--device", "cpu", "--json", *options)


def rewrite(folder, change, columns=COLUMNS):
    """data.csv with `change` applied to its list of rows (lists of cells)."""
    rows = [list(row.values()) for row in read_table(folder)]
    write_table(folder, change(rows), columns)


def with_cell(row, column, value):
    def change(rows):
        rows[row][column] = value
        return rows

    return change


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (truncate, "not a readable image"),
        (lambda path: path.write_text("no image"), "not a readable image"),
        (lambda path: path.write_bytes(b""), "not a readable image"),
        (lambda path: path.unlink(), "no image of that name"),
    ],
    ids=["truncated", "text", "empty", "missing"],
)
def test_unreadable_images(agiqa, pictures, new, tiny_vision_checkpoint, harm, reason):
    harm(pictures / "images" / "002.png")
    outcome = extract(agiqa, pictures, new, tiny_vision_checkpoint)
    refuse(outcome, "002.png (data.csv, line 4)", reason, pictures / "images")
    assert "003.png" not in outcome.err
    assert not new.exists()
    skipped = extract(agiqa, pictures, new, tiny_vision_checkpoint, "--on-bad-item", "skip")
    assert (skipped.json["items"], len(skipped.json["skipped"])) == (5, 1)
    assert "skipped 002.png" in skipped.err


@pytest.mark.parametrize(
    ("change", "mentions"),
    [
        (with_cell(2, 1, ""), ("002.png (data.csv, line 4)", "the prompt is empty")),
        (with_cell(2, 1, "  "), ("002.png (data.csv, line 4)", "the prompt is empty")),
        (with_cell(2, 2, ""), ("002.png (data.csv, line 4)", "no MOS at all")),
        (with_cell(2, 2, "good"), ("002.png (data.csv, line 4)", "'good', not a number")),
        (with_cell(2, 2, "nan"), ("002.png (data.csv, line 4)", "mos_quality is nan, outside 0 to 5")),
        (with_cell(2, 2, "61"), ("002.png (data.csv, line 4)", "mos_quality is 61, outside 0 to 5")),
        (with_cell(2, 0, "001.png"), ("001.png (data.csv, line 4)", "duplicate of line 3")),
        (with_cell(2, 0, "../001.png"), ("../001.png", "line 4", "not a plain relative path")),
        (with_cell(2, 0, "/etc/passwd"), ("/etc/passwd", "line 4", "not a plain relative path")),
        (with_cell(2, 0, ""), ("line 4", "the name is empty")),
        (with_cell(2, 3, "tset"), ("002.png (data.csv, line 4)", "split 'tset'")),
        (with_cell(2, 4, ""), ("002.png (data.csv, line 4)", "no description")),
        (lambda rows: [*rows[:2], rows[2][:3], *rows[3:]], ("line 4", "has 3 fields where the header has 5")),
        (lambda _rows: [], ("data.csv", "a header but no rows")),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_bad_rows(agiqa, texts, new, tiny_text_checkpoint, change, mentions):
    rewrite(texts, change)
    refuse(extract(agiqa, texts, new, tiny_text_checkpoint), *mentions)
    assert not new.exists()


def test_missing_columns(agiqa, texts, new, tiny_text_checkpoint):
    rewrite(texts, lambda rows: rows, ["name", "words", "mos_quality", "split", "description"])
    refuse(extract(agiqa, texts, new, tiny_text_checkpoint), texts / "data.csv", "no column 'prompt'")
    rewrite(texts, lambda rows: rows, ["name", "prompt", "mark", "split", "description"])
    refuse(extract(agiqa, texts, new, tiny_text_checkpoint), texts / "data.csv", "no MOS column")
    assert not new.exists()


def test_all_bad_rows_are_told_at_once(agiqa, texts, new, tiny_text_checkpoint):
    rewrite(texts, lambda rows: with_cell(1, 1, "")(with_cell(4, 2, "x")(rows)))
    refuse(extract(agiqa, texts, new, tiny_text_checkpoint), "2 problems", "001.png", "004.png")


def test_a_table_that_is_no_text(agiqa, texts, new, tiny_text_checkpoint):
    (texts / "data.csv").write_bytes(b"name,prompt,mos\n\xff\xfe\x00")
    refuse(extract(agiqa, texts, new, tiny_text_checkpoint), texts / "data.csv", "not UTF-8")
    assert not new.exists()


def test_an_empty_folder(agiqa, tmp_path, new, tiny_text_checkpoint):
    (tmp_path / "nothing").mkdir()
    refuse(extract(agiqa, tmp_path / "nothing", new, tiny_text_checkpoint), tmp_path / "nothing", "data.csv")
    assert not new.exists()


@pytest.mark.parametrize(
    ("harm", "mention"),
    [
        (lambda talk: talk["conversations"].reverse(), "expected user, assistant, user, assistant"),
        (lambda talk: talk["conversations"].pop(0), "expected user, assistant, user"),
        (lambda talk: talk.update(conversations=[]), "has 0 messages"),
        (lambda talk: talk["conversations"][1].update(content=" "), "message 2 is empty"),
        (lambda talk: talk.update(image="set/images/unknown.png"), "'set/images/unknown.png'"),
        (lambda talk: talk.update(image="set/images/001.png"), "has a conversation already"),
    ],
    ids=["reversed", "three", "none", "empty", "unknown", "twice"],
)
def test_bad_conversations(agiqa, texts, new, tiny_text_checkpoint, harm, mention):
    path = write_talks(texts)
    talks = json.loads(path.read_text())
    harm(talks[2])
    path.write_text(json.dumps(talks))
    outcome = extract(agiqa, texts, new, tiny_text_checkpoint, "--conversations", path)
    refuse(outcome, "talks.json, id '002.png'", mention)
    assert not new.exists()


def test_conversations_that_are_no_json(agiqa, texts, new, tiny_text_checkpoint):
    (texts / "talks.json").write_text("[{]")
    outcome = extract(agiqa, texts, new, tiny_text_checkpoint, "--conversations", texts / "talks.json")
    refuse(outcome, texts / "talks.json", "not JSON")


def test_labels_that_join_nothing(agiqa, texts, new, tmp_path, tiny_text_checkpoint):
    talks = write_talks(texts)
    rows = [[f"other/{row['name']}.jpg", row["prompt"], "1"] for row in read_table(texts)]
    table = write_table(tmp_path / "other", rows, ["name", "prompt", "mos_quality"]) / "data.csv"
    refuse(extract(agiqa, talks, new, tiny_text_checkpoint, "--labels", table), talks, table, "no image in common")
    refuse(extract(agiqa, talks, new, tiny_text_checkpoint), talks, "--labels")
    assert not new.exists()


def test_a_store_made_with_other_settings(agiqa, example, texts):
    before = (example.store / "MANIFEST.json").read_bytes()
    refuse(agiqa(*example.extract(example.store, "--variant", "full")), example.store, "stored 'id', asked 'full'")
    refuse(extract(agiqa, texts, example.store, example.model), "data_set.items: stored 40, asked 6")
    assert (example.store / "MANIFEST.json").read_bytes() == before
    assert agiqa("store", "verify", example.store, "--level", "full").code == 0


def test_a_path_that_holds_something_else(agiqa, example, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "notes.txt"):
        refuse(agiqa(*example.extract(path)), path, "not a feature store")
    refuse(agiqa("store", "sketch", example.store, tmp_path, "--rank", 4), tmp_path, "not a feature store")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("command", ["verify", "seal", "repair", "gc", "export", "push"])
def test_commands_that_work_on_a_folder_say_to_pull_a_url(agiqa, command, tmp_path):
    further = [tmp_path / "out"] if command in ("export", "push") else []
    outcome = agiqa("store", command, "https://example.org/s.agiqa", *further)
    assert outcome.code == 2
    assert "`agiqa store pull` it first" in outcome.err


def test_a_folder_that_a_pull_was_cut_off_in(agiqa, example, tmp_path):
    copy = shutil.copytree(example.store, tmp_path / "copy.agiqa")
    (copy / "MANIFEST.json").rename(copy / "PULLING.json")
    for arguments in (example.extract(copy), ("store", "export", copy, tmp_path / "s.h5")):
        outcome = agiqa(*arguments)
        assert (outcome.code, outcome.out) == (1, "")
        assert "agiqa store pull" in outcome.err


def test_ranks_that_a_model_does_not_have(agiqa, example, new):
    refuse(agiqa("store", "sketch", example.store, new, "--rank", 33), "33", "1..32")
    refuse(agiqa(*example.extract(new, "--encoding", "sketch", "--rank", 33)), "33", "1..32")
    refuse(
        agiqa("store", "sketch", example.sketch, new, "--rank", 4), example.sketch, "needs the store of hidden states"
    )
    refuse(agiqa("store", "sketch", example.store, new), "--rank", "--basis")
    refuse(agiqa("store", "sketch", example.store, example.store, "--rank", 4), "give another path")
    assert not new.exists()


def test_heads_that_cannot_read_a_store(agiqa, example, tmp_path):
    other = tmp_path / "other.agiqa"
    assert agiqa("store", "sketch", example.store, other, "--rank", 8).code == 0
    run, out = tmp_path / "run", tmp_path / "scores.csv"
    assert agiqa("train", example.sketch, run, *SMALL_HEAD, "--projection", "sketch").code == 0
    refuse(agiqa("evaluate", run, other), run, "basis", "agiqa store sketch")
    refuse(agiqa("predict", run, other, out), run, "basis")
    refuse(agiqa("predict", run, example.store, out), run, "'sketch'", "'hidden'")
    refuse(agiqa("predict", example.run, example.sketch, out), example.run, "'hidden'", "'sketch'")
    assert not out.exists()
    same = tmp_path / "same.agiqa"
    assert agiqa("store", "sketch", example.store, same, "--basis", example.sketch).code == 0
    assert agiqa("predict", run, same, out).code == 0


def test_a_head_of_another_model(agiqa, example, tmp_path):
    model = tiny_models.write_text_checkpoint(tmp_path / "model", seed=1)
    store = tmp_path / "s.agiqa"
    assert extract(agiqa, example.data, store, model).code == 0
    refuse(agiqa("evaluate", example.run, store), example.run, "language-model head", "same model")


def test_a_run_folder_that_exists(agiqa, example):
    before = {file.name: file.read_bytes() for file in example.run.iterdir()}
    refuse(agiqa("train", example.store, example.run, *SMALL_HEAD), example.run, "Choose another run folder")
    assert {file.name: file.read_bytes() for file in example.run.iterdir()} == before


def test_folders_that_are_no_run_and_no_store(agiqa, example, tmp_path):
    refuse(agiqa("evaluate", tmp_path, example.store), tmp_path, "no run folder")
    refuse(agiqa("evaluate", example.run, tmp_path), tmp_path, "not a feature store")
    refuse(agiqa("store", "info", tmp_path), tmp_path, "not a feature store")
    refuse(agiqa("store", "verify", example.run), example.run, "not a feature store")


@pytest.mark.parametrize("kind", ["folder", "file", "package", "type", "weights", "tokenizer", "torn", "nowhere"])
def test_models_that_are_none(agiqa, texts, new, tmp_path, tiny_text_checkpoint, kind):
    model = tmp_path / "model"
    if kind == "folder":
        model.mkdir()
    elif kind == "file":
        model.write_text("not a model")
    elif kind == "package":
        model = "pkg:no_such_package"
    elif kind != "nowhere":
        shutil.copytree(tiny_text_checkpoint, model)
    if kind == "type":
        (model / "config.json").write_text('{"model_type": "lamma"}')
    elif kind == "weights":
        (model / "model.safetensors").unlink()
    elif kind == "tokenizer":
        (model / "tokenizer.json").unlink()
    elif kind == "torn":
        truncate(model / "model.safetensors")
    refuse(extract(agiqa, texts, new, model), model)
    if new.exists():  # the plan needs no weights, so torn ones are found when they are loaded
        assert kind == "torn"
        refuse(agiqa("train", new, tmp_path / "run"), new, "incomplete")


@pytest.fixture
def damaged(example, tmp_path):
    """A copy of the hidden store, and a function that flips one bit in the middle of its object."""
    copy = tmp_path / "damaged.agiqa"
    shutil.copytree(example.store, copy)

    def flip(part):
        path = copy / part
        files = [path] if path.is_file() else sorted(file for file in (path / "c").rglob("*") if file.is_file())
        raw = bytearray(files[0].read_bytes())
        raw[len(raw) // 3] ^= 16
        files[0].write_bytes(raw)
        return copy

    return flip


@pytest.mark.parametrize(
    "part", ["features", "tokens/roles", "lm_head/weight", "index/n_tokens", "index/unit", "index/row_start"]
)
def test_a_flipped_bit_is_never_trained_on(agiqa, damaged, tmp_path, part):
    store = damaged(f"store.zarr/{part}")
    outcome = agiqa("train", store, tmp_path / "run", *SMALL_HEAD)
    refuse(outcome, store, "store verify")
    assert not (tmp_path / "run").exists()
    assert agiqa("store", "verify", store, "--level", "full").code == 1


@pytest.mark.parametrize("part", ["items.parquet", "store.zarr/zarr.json"])
def test_torn_files_outside_the_arrays_are_named(agiqa, damaged, tmp_path, part):
    store = damaged(part)
    truncate(store / part)
    refuse(agiqa("train", store, tmp_path / "run", *SMALL_HEAD), store / part)


def test_verify_names_a_torn_manifest(agiqa, damaged):
    store = damaged("MANIFEST.json")
    truncate(store / "MANIFEST.json")
    refuse(agiqa("store", "verify", store), store / "MANIFEST.json")


def test_changed_labels_are_never_trained_on(agiqa, damaged, tmp_path):
    store = damaged("items.parquet")
    for position in range(100, (store / "items.parquet").stat().st_size, 97):
        raw = bytearray((store / "items.parquet").read_bytes())
        raw[position] ^= 2
        (store / "items.parquet").write_bytes(raw)
        outcome = agiqa("train", store, tmp_path / "run", *SMALL_HEAD)
        refuse(outcome, store / "items.parquet")
        raw[position] ^= 2
        (store / "items.parquet").write_bytes(raw)


def test_a_damaged_run_folder(agiqa, example, tmp_path):
    for name in ("config.json", "metrics.json", "head.safetensors"):
        run = tmp_path / name
        shutil.copytree(example.run, run)
        truncate(run / name)
        refuse(agiqa("evaluate", run, example.store), run, name)


def test_training_on_what_is_not_there(agiqa, example, tmp_path):
    run = tmp_path / "run"
    refuse(agiqa("train", example.store, run, "--label", "authenticity"), "'authenticity'", "Known: quality")
    unfinished = tmp_path / "unfinished.agiqa"
    assert agiqa(*example.extract(unfinished, "--plan-only")).code == 0
    refuse(agiqa("train", unfinished, run), unfinished, "incomplete", "Run the same `agiqa extract` again")
    refuse(agiqa("evaluate", example.run, unfinished), unfinished, "incomplete")
    refuse(agiqa("store", "sketch", unfinished, tmp_path / "sketch", "--rank", 4), unfinished, "incomplete")
    refuse(agiqa("train", example.store, run, "--width", 0), "width", "greater than or equal to 1")
    refuse(agiqa("train", example.sketch, run, "--projection", "vocabulary"), "the projection 'sketch' for a sketch")
    assert not run.exists()
    assert not (tmp_path / "sketch").exists()


@pytest.fixture
def relabelled(agiqa, example, tmp_path):
    """A function that gives a copy of the hidden store other rows: `change` gets and returns (name, MOS, split)."""

    def relabel(change):
        store = shutil.copytree(example.store, tmp_path / "relabelled.agiqa")
        rows = [change(number, row["name"], row["mos_quality"], row["split"]) for number, row in enumerate(talked)]
        table = write_table(tmp_path / "table", rows, ["name", "mos_quality", "split"]) / "data.csv"
        outcome = agiqa("store", "labels", store, table)
        assert outcome.code == 0, outcome.err
        return store

    talked = read_table(example.data)
    return relabel


def test_labels_that_are_all_the_same(agiqa, relabelled, tmp_path):
    store = relabelled(lambda number, name, mos, split: [name, 3.0, split])
    outcome = agiqa("train", store, tmp_path / "run", *SMALL_HEAD)
    refuse(outcome, "training items have the label 3.0: there is nothing to learn")
    assert not (tmp_path / "run").exists()


def test_a_single_training_item(agiqa, relabelled, tmp_path):
    store = relabelled(lambda number, name, mos, split: [name, mos, "test" if number else "train"])
    refuse(agiqa("train", store, tmp_path / "run", *SMALL_HEAD), "two different prompts or more, and 1 items have 1")
    outcome = agiqa("train", store, tmp_path / "run", *SMALL_HEAD, "--validation", 0)
    refuse(outcome, "The training part is a single item")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["relabelled.agiqa", "table"]


def test_a_head_without_validation_items(agiqa, example, tmp_path):
    trained = agiqa("train", example.store, tmp_path / "run", *SMALL_HEAD, "--validation", 0, "--json")
    assert trained.json["validation"] is None
    assert trained.json["chosen_by"] == "last epoch, as there are no validation items"
    refuse(agiqa("evaluate", tmp_path / "run", example.store, "--split", "validation"), "no item", "'validation'")


def test_a_split_that_leaks_prompts_is_warned_of_with_its_size(agiqa, example, tmp_path):
    outcome = agiqa("train", example.store, tmp_path / "run", *SMALL_HEAD)
    assert outcome.code == 0
    assert "warning: 10 of 10 test items have a prompt that also occurs in training" in outcome.err


def test_nan_features_that_another_program_has_stored(agiqa, tmp_path, monkeypatch):
    """Ours refuses them when it writes; a store made elsewhere may hold them under right checksums."""
    content = make_content([5] * 12)
    content.hidden[3][2, 1] = 0x7FC0
    content.items.labels["quality"][:] = range(12)
    monkeypatch.setattr("agiqa.store.filling.finite_rows", lambda rows, _dtype: np.ones(len(rows), bool))
    store = make_store(tmp_path / "s.agiqa", content)
    outcome = agiqa("train", store.path, tmp_path / "run", *SMALL_HEAD)
    refuse(outcome, "1 problem", "'image_3.png' holds NaN or inf features")
    assert [path.name for path in tmp_path.iterdir()] == ["s.agiqa"]


def test_fp16_on_a_cpu(agiqa, example, tmp_path):
    outcome = agiqa("train", example.store, tmp_path / "run", *SMALL_HEAD, "--precision", "fp16")
    refuse(outcome, "'fp16' needs a CUDA device", "'bf16' or 'fp32'")


def test_items_without_the_label(agiqa, texts, tmp_path, tiny_text_checkpoint):
    columns = ["name", "prompt", "mos_quality", "split", "description", "mos_authenticity"]
    rewrite(texts, lambda rows: [[*row, "" if number == 2 else "3.5"] for number, row in enumerate(rows)], columns)
    store = tmp_path / "s.agiqa"
    assert extract(agiqa, texts, store, tiny_text_checkpoint).code == 0
    outcome = agiqa("train", store, tmp_path / "run", "--label", "authenticity", "--validation", 0, *SMALL_HEAD)
    refuse(outcome, "'002.png' has no authenticity MOS", "authenticity on 5 of 6 items")


def test_a_data_set_without_splits_says_what_to_do(agiqa, texts, tmp_path, tiny_text_checkpoint):
    rewrite(texts, lambda rows: [[*row[:3], "", row[4]] for row in rows])
    store = tmp_path / "s.agiqa"
    assert extract(agiqa, texts, store, tiny_text_checkpoint).code == 0
    refuse(agiqa("train", store, tmp_path / "run", *SMALL_HEAD), "'published'", "'grouped'")


def test_predictions_cannot_replace_a_folder_or_go_nowhere(agiqa, example, tmp_path):
    refuse(agiqa("predict", example.run, example.store, tmp_path / "no" / "scores.csv"), tmp_path / "no")
    good = tmp_path / "scores.csv"
    assert agiqa("predict", example.run, example.store, good).code == 0
    with good.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 40
    assert [path.name for path in tmp_path.iterdir()] == ["scores.csv"]


def test_images_swapped_after_the_store_was_made(agiqa, pictures, new, tiny_vision_checkpoint):
    assert extract(agiqa, pictures, new, tiny_vision_checkpoint).code == 0
    save_noise(pictures / "images" / "001.png", seed=3)
    refuse(extract(agiqa, pictures, new, tiny_vision_checkpoint), new, "data_set.plan_sha256")
