"""Filled stores against transformers run item by item, and fills that stop, share and come back."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from agiqa.errors import ConfigError, DataError, HeadError, SettingsConflict, ViewRefused
from agiqa.extract import LengthRule
from agiqa.extract.filling.calibration import calibrated
from agiqa.extract.filling.fill import Filler
from agiqa.extract.filling.plan import store_plan, tokenise
from agiqa.extract.filling.targets import Target
from agiqa.store import TOKEN_ROLES, create_store, open_store, seal, verify
from tests.extract import tiny_models
from tests.extract.jobs import extract, inputs
from tests.extract.oracle import all_hidden, expected
from tests.extract.small_sets import read_table, write_set, write_table, write_talks


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = write_set(tmp_path_factory.mktemp("sets") / "texts", 24)
    write_talks(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = write_set(tmp_path_factory.mktemp("sets") / "pictures", 12, images=True)
    write_talks(folder)
    return folder


@pytest.fixture(scope="module")
def hidden_store(texts, tiny_text_checkpoint, tmp_path_factory):
    return extract(texts, tiny_text_checkpoint, tmp_path_factory.mktemp("stores") / "hidden.agiqa").store


@pytest.fixture(scope="module")
def sketch_store(texts, tiny_text_checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("stores") / "sketch.agiqa"
    return extract(texts, tiny_text_checkpoint, path, encoding="sketch", rank=6).store


def training(items):
    return [item for item in items if item.split == "train"]


@pytest.mark.parametrize("kind", ["text", "vision"])
def test_a_store_holds_what_the_model_itself_computes(kind, request, tmp_path):
    checkpoint = request.getfixturevalue(f"tiny_{kind}_checkpoint")
    folder = request.getfixturevalue({"text": "texts", "vision": "pictures"}[kind])
    store = extract(folder, checkpoint, tmp_path / "s.agiqa", batch_size=5).store
    data_set, backbone = inputs(folder, checkpoint)
    tokenizer = backbone.renderer.tokenizer
    for position, item in enumerate(data_set.items):
        own, rows = expected(checkpoint, item), store.read([position])
        found = rows.float32()
        np.testing.assert_allclose(found, own.hidden, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found @ store.lm_head().T, own.logits, rtol=1e-3, atol=1e-3)
        ids = store.array("tokens/ids")[int(store.row_starts[position]) : int(store.row_ends[position])]
        np.testing.assert_array_equal(ids, own.token_ids)
        words = tokenizer.decode(ids[rows.roles == TOKEN_ROLES["question"]].tolist())
        assert words.replace(" ", "").replace("\n", "") == "Whatdoyousee?Rateit."
        assert tokenizer.decode(ids[rows.roles == TOKEN_ROLES["answer"]].tolist()).strip() == item.description
        assert int((rows.roles == TOKEN_ROLES["image"]).sum()) == (16 if kind == "vision" else 0)
    assert verify(store, "numeric").sound


def test_labels_prompts_and_splits_travel_with_the_items(hidden_store, texts):
    rows, items = read_table(texts), hidden_store.items
    assert items.names == [row["name"] for row in rows]
    assert items.prompts == [row["prompt"] for row in rows]
    assert items.splits == [row["split"] for row in rows]
    assert items.labels["quality"].tolist() == [float(row["mos_quality"]) for row in rows]


def test_a_sketch_is_the_best_frame_of_the_training_logits(sketch_store, texts, tiny_text_checkpoint):
    data_set, _ = inputs(texts, tiny_text_checkpoint)
    weight = inputs(texts, tiny_text_checkpoint)[1].lm_head().double().numpy()
    calibration = all_hidden(tiny_text_checkpoint, training(data_set.items)).astype(np.float64)
    logits = calibration @ weight.T
    energy, frame = np.linalg.eigh(logits.T @ logits / len(logits))
    basis = sketch_store.basis()
    np.testing.assert_allclose(basis.energy[:6], energy[::-1][:6], rtol=1e-4)
    np.testing.assert_allclose(basis.q @ basis.q.T, frame[:, -6:] @ frame[:, -6:].T, atol=1e-3)
    everything = sketch_store.read(range(24))
    own = all_hidden(tiny_text_checkpoint, data_set.items)
    np.testing.assert_allclose(everything.float32(), own @ basis.map.T, rtol=5e-3, atol=5e-3 * np.sqrt(basis.energy[0]))
    assert verify(sketch_store, "numeric").sound


def test_test_items_have_no_say_in_the_basis(sketch_store, texts, tiny_text_checkpoint, tmp_path):
    rows = [list(row.values()) for row in read_table(texts)]
    changed = [row if row[3] == "train" else [*row[:4], "sharp " * 9] for row in rows]
    assert changed != rows
    write_talks(write_table(tmp_path / "texts", changed))
    other = extract(tmp_path / "texts", tiny_text_checkpoint, tmp_path / "s.agiqa", encoding="sketch", rank=6).store
    assert other.id != sketch_store.id
    assert other.basis().id == sketch_store.basis().id


def test_a_basis_from_another_store_is_used_as_it_is(sketch_store, tiny_text_checkpoint, tmp_path):
    folder = write_set(tmp_path / "new", 8, seed=5)
    write_talks(folder)
    options = {"encoding": "sketch", "basis": sketch_store.path}
    store = extract(folder, tiny_text_checkpoint, tmp_path / "s.agiqa", **options).store
    basis = store.basis()
    assert basis.id == sketch_store.basis().id
    own = all_hidden(tiny_text_checkpoint, inputs(folder, tiny_text_checkpoint)[0].items)
    found = store.read(range(8)).float32()
    np.testing.assert_allclose(found, own @ basis.map.T, rtol=5e-3, atol=5e-3 * np.sqrt(basis.energy[0]))
    again = extract(folder, tiny_text_checkpoint, store.path, **options)
    assert (again.store.id, again.fill) == (store.id, None)


def test_the_basis_of_another_model_is_refused_before_there_is_a_store(sketch_store, texts, tmp_path):
    other = tiny_models.write_text_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(HeadError, match="Use a basis made from this model"):
        extract(texts, other, tmp_path / "s.agiqa", encoding="sketch", basis=sketch_store.path)
    assert not (tmp_path / "s.agiqa").exists()


def test_another_rank_or_basis_at_the_same_path_is_refused_and_named(
    sketch_store, hidden_store, texts, tiny_text_checkpoint, tmp_path
):
    with pytest.raises(SettingsConflict, match=r"sketch\.rank: stored 6, asked 4"):
        extract(texts, tiny_text_checkpoint, sketch_store.path, encoding="sketch", rank=4)
    folder = write_set(tmp_path / "new", 8, seed=5)
    write_talks(folder)
    elsewhere = extract(folder, tiny_text_checkpoint, tmp_path / "e.agiqa", encoding="sketch", rank=6).store
    borrowed = tmp_path / "borrowed.agiqa"
    extract(texts, tiny_text_checkpoint, borrowed, encoding="sketch", basis=elsewhere.path)
    with pytest.raises(SettingsConflict, match=r"sketch\.calibration: stored"):
        extract(texts, tiny_text_checkpoint, borrowed, encoding="sketch", rank=6)
    with pytest.raises(ViewRefused, match="holds hidden, which has no basis"):
        extract(texts, tiny_text_checkpoint, tmp_path / "s.agiqa", encoding="sketch", basis=hidden_store.path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoding": "sketch", "rank": 33}, r"rank 33 is outside 1\.\.32"),
        ({"encoding": "sketch"}, "needs either --rank"),
        ({"encoding": "sketch", "rank": 4, "basis": "SKETCH"}, "needs either --rank"),
        ({"rank": 4}, "belong to --encoding sketch"),
    ],
)
def test_sketch_options_that_mean_nothing_are_refused(
    options, message, sketch_store, texts, tiny_text_checkpoint, tmp_path
):
    given = {name: sketch_store.path if value == "SKETCH" else value for name, value in options.items()}
    with pytest.raises(ConfigError, match=message):
        extract(texts, tiny_text_checkpoint, tmp_path / "s.agiqa", **given)
    assert not (tmp_path / "s.agiqa").exists()


def test_a_basis_is_calibrated_on_items_as_they_are_stored(texts, tiny_text_checkpoint, tmp_path):
    rule = LengthRule(max_tokens=40, truncate=True)
    store = extract(texts, tiny_text_checkpoint, tmp_path / "s.agiqa", encoding="sketch", rank=4, length=rule).store
    data_set, backbone = inputs(texts, tiny_text_checkpoint)
    cut = all_hidden(tiny_text_checkpoint, training(data_set.items), limit=40).astype(np.float64)
    logits = cut @ backbone.lm_head().double().numpy().T
    energy = np.linalg.eigvalsh(logits.T @ logits / len(cut))
    np.testing.assert_allclose(store.basis().energy[:4], energy[::-1][:4], rtol=1e-4)


def states_of(files):
    return {file: (file.stat().st_mtime_ns, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files}


def test_a_resumed_fill_leaves_finished_units_alone(hidden_store, texts, tiny_text_checkpoint, tmp_path):
    path = tmp_path / "s.agiqa"
    first = extract(texts, tiny_text_checkpoint, path, part=(1, 2))
    store = first.store
    done = store.committed_units()
    assert done == list(range(0, store.geometry.units, 2))
    assert first.fill is not None
    assert first.fill.units == len(done)
    objects = [store.layout.features_object(unit) for unit in done] + [store.layout.commit(unit) for unit in done]
    objects += [file for file in (store.layout.zarr / "lm_head").rglob("*") if file.is_file()]
    objects += [file for file in (store.layout.zarr / "probe").rglob("*") if file.is_file()]
    before = states_of(objects)
    # a unit that a killed run left without its record, in bytes that mean nothing
    torn = store.layout.features_object(1)
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b"torn")
    second = extract(texts, tiny_text_checkpoint, path)
    assert second.store.is_sealed
    assert second.fill is not None
    assert second.fill.units == store.geometry.units - len(done)
    assert states_of(objects) == before
    assert verify(second.store, "full").sound
    everything = np.arange(24)
    np.testing.assert_array_equal(second.store.read(everything).rows, hidden_store.read(everything).rows)
    assert extract(texts, tiny_text_checkpoint, path).fill is None


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_parts_fill_everything_and_the_last_one_seals(order, texts, tiny_text_checkpoint, tmp_path):
    path = tmp_path / "s.agiqa"
    states = []
    for share in order:
        result = extract(texts, tiny_text_checkpoint, path, part=(share, 3))
        states.append(result.store.is_sealed)
        again = extract(texts, tiny_text_checkpoint, path, part=(share, 3))
        assert again.fill is None or again.fill.units == 0
    assert states == [False, False, True]
    assert verify(open_store(path), "full").sound


def test_parts_with_other_batch_sizes_give_the_same_numbers(hidden_store, texts, tiny_text_checkpoint, tmp_path):
    path = tmp_path / "s.agiqa"
    extract(texts, tiny_text_checkpoint, path, part=(1, 2), batch_size=1)
    mixed = extract(texts, tiny_text_checkpoint, path, part=(2, 2), batch_size=7).store
    assert mixed.id == hidden_store.id
    everything = np.arange(24)
    found, reference = mixed.read(everything), hidden_store.read(everything)
    np.testing.assert_allclose(found.float32(), reference.float32(), rtol=1e-4, atol=1e-4)


def test_runs_that_calibrate_side_by_side_store_in_one_basis(texts, tiny_text_checkpoint, tmp_path):
    """The sign of an eigenvector is arbitrary: another machine may compute the same basis with other signs."""
    data_set, backbone = inputs(texts, tiny_text_checkpoint)
    tokenised = tokenise(data_set, backbone, LengthRule())
    target = calibrated(backbone, tokenised, Target(encoding="sketch"), rank=4, batch_size=8)
    basis = target.basis
    assert basis is not None
    turned = replace(basis, id="turned", map=-basis.map, q=-basis.q, mean=-basis.mean)
    for share, mine in ((1, target), (2, Target(encoding="sketch", basis=turned))):
        conversation = {"variant": "id", "aspect": "quality"}
        plan = store_plan(data_set, backbone, tokenised, rule=LengthRule(), conversation=conversation, target=mine)
        store = create_store(tmp_path / "s.agiqa", plan)
        filler = Filler(store, backbone, tokenised.planned, target=mine, batch_size=8)
        with filler.model_arrays_written():
            pass
        filler.fill(part=(share, 2))
    store = seal(store)
    own = all_hidden(tiny_text_checkpoint, data_set.items) @ store.basis().map.T
    np.testing.assert_allclose(store.read(range(24)).float32(), own, rtol=5e-3, atol=5e-3 * np.sqrt(basis.energy[0]))


def test_an_image_that_vanishes_midway_is_named_and_the_rest_is_kept(tiny_vision_checkpoint, tmp_path):
    folder = write_set(tmp_path / "set", 8, images=True)
    write_talks(folder)
    data_set, backbone = inputs(folder, tiny_vision_checkpoint)
    tokenised = tokenise(data_set, backbone, LengthRule())
    conversation = {"variant": "id", "aspect": "quality"}
    path = tmp_path / "s.agiqa"
    target = Target(encoding="hidden")
    plan = store_plan(data_set, backbone, tokenised, rule=LengthRule(), conversation=conversation, target=target)
    store = create_store(path, plan)
    filler = Filler(store, backbone, tokenised.planned, target=target, batch_size=4)
    with filler.model_arrays_written():
        pass
    missing = folder / "images" / "003.png"
    content = missing.read_bytes()
    missing.unlink()
    with pytest.raises(DataError, match=r"003\.png: no such image") as caught:
        filler.fill()
    assert caught.value.__notes__ == ["while reading item '003.png'"]
    assert 0 < len(store.committed_units()) < store.geometry.units
    missing.write_bytes(content)
    assert extract(folder, tiny_vision_checkpoint, path).store.is_sealed
