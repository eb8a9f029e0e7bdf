"""Sketches against explicit logits in float64."""

import numpy as np
import pytest

from agiqa.errors import ConfigError, HeadError, SettingsConflict, UnknownName, ViewRefused
from agiqa.store import basis_from, open_store, sketch_store, to_float32, verify
from tests.store.conftest import make_content, make_store


def explicit_logits(content, items):
    hidden = [to_float32(content.hidden[item], content.logical_dtype).astype(np.float64) for item in items]
    return np.concatenate(hidden) @ content.lm_head.T.astype(np.float64)


def training_items(content):
    return [item for item, split in enumerate(content.items.splits) if split == "train"]


def test_basis_is_the_best_rank_r_frame_of_the_training_logits(stored, content):
    basis = basis_from(stored, 5)
    logits = explicit_logits(content, training_items(content))
    _, singular, right = np.linalg.svd(logits, full_matrices=False)
    np.testing.assert_allclose(basis.energy, singular[:16] ** 2 / len(logits), rtol=1e-5, atol=1e-6)
    projector = basis.q @ basis.q.T
    np.testing.assert_allclose(projector, right[:5].T @ right[:5], atol=1e-5)
    np.testing.assert_allclose(basis.q.T @ basis.q, np.eye(5), atol=1e-5)
    assert basis.energy_kept == pytest.approx((singular[:5] ** 2).sum() / (singular**2).sum(), rel=1e-6)


def test_at_full_rank_norms_inner_products_and_projections_are_kept(stored, content, tmp_path):
    basis = basis_from(stored, 16)
    logits = explicit_logits(content, range(40))
    hidden = np.concatenate([to_float32(rows, content.logical_dtype) for rows in content.hidden])
    coordinates = basis.coordinates(hidden).astype(np.float64)
    np.testing.assert_allclose(coordinates @ coordinates.T, logits @ logits.T, rtol=1e-3, atol=1e-2)
    projection = np.random.default_rng(1).normal(size=(3, 40))
    folded = projection @ basis.q
    np.testing.assert_allclose(coordinates @ folded.T, logits @ projection.T, rtol=1e-3, atol=1e-2)


def test_a_basis_of_the_head_alone_is_its_leading_singular_frame(stored, content, tmp_path):
    basis = basis_from(stored, 5, method="lm_head")
    left, singular, _ = np.linalg.svd(content.lm_head.astype(np.float64), full_matrices=False)
    np.testing.assert_allclose(basis.q @ basis.q.T, left[:, :5] @ left[:, :5].T, atol=1e-5)
    assert basis.energy_kept == pytest.approx((singular[:5] ** 2).sum() / (singular**2).sum(), rel=1e-6)
    assert (basis.method, basis.calibration) == ("lm_head", "none")
    made = sketch_store(stored, tmp_path / "sketch.agiqa", basis=basis)
    assert verify(made.store, "numeric").sound
    assert made.store.basis().method == "lm_head"
    with pytest.raises(UnknownName, match="Did you mean 'lm_head'"):
        basis_from(stored, 5, method="lmhead")


def test_lifted_and_folded_projections_give_the_outputs_of_explicit_logits(stored, content):
    logits = explicit_logits(content, range(40))
    hidden = np.concatenate([to_float32(rows, content.logical_dtype) for rows in content.hidden])
    random = np.random.default_rng(2)
    basis = basis_from(stored, 6)
    coordinates = basis.coordinates(hidden).astype(np.float64)
    trained = random.normal(size=(3, 6))
    kept = logits @ basis.q.astype(np.float64) @ basis.q.T.astype(np.float64)
    np.testing.assert_allclose(kept @ basis.lift(trained).T, coordinates @ trained.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(logits @ basis.lift(trained).T, coordinates @ trained.T, rtol=1e-4, atol=1e-4)
    vocabulary = random.normal(size=(3, 40))
    np.testing.assert_allclose(kept @ vocabulary.T, coordinates @ basis.fold(vocabulary).T, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(basis.fold(basis.lift(trained)), trained, atol=1e-5)
    whole = basis_from(stored, 16)
    outputs = whole.coordinates(hidden).astype(np.float64) @ whole.fold(vocabulary).T
    np.testing.assert_allclose(outputs, logits @ vocabulary.T, rtol=1e-3, atol=1e-2)


def test_sketched_store_holds_the_coordinates_and_says_its_error(stored, content, tmp_path):
    basis = basis_from(stored, 6)
    result = sketch_store(stored, tmp_path / "sketch.agiqa", basis=basis)
    sketch = open_store(result.store.path)
    assert verify(sketch, "numeric").sound
    assert sketch.basis().id == basis.id
    assert sketch.items.same_as(stored.items)
    read, source = sketch.read(range(40)), stored.read(range(40))
    np.testing.assert_array_equal(read.roles, source.roles)
    expected = source.float32().astype(np.float64) @ basis.map.T.astype(np.float64)
    np.testing.assert_allclose(read.float32(), expected, rtol=2e-3, atol=2e-2)
    logits = explicit_logits(content, range(40))
    kept = expected @ basis.q.T.astype(np.float64)
    exact_error = np.linalg.norm(logits - kept) / np.linalg.norm(logits)
    assert result.logit_error == pytest.approx(exact_error, rel=0.15)
    projection = np.random.default_rng(5).normal(size=(40, 200))
    projected = np.linalg.norm((logits - kept) @ projection) / np.linalg.norm(logits @ projection)
    assert result.projection_error == pytest.approx(projected, rel=0.3)


def test_test_items_never_enter_the_basis(tmp_path, content):
    changed = make_content([len(rows) for rows in content.hidden])
    for item, split in enumerate(content.items.splits):
        source = content if split == "train" else make_content([len(rows) for rows in content.hidden], seed=9)
        changed.hidden[item][:] = source.hidden[item]
    one = basis_from(make_store(tmp_path / "a.agiqa", content), 4)
    two = basis_from(make_store(tmp_path / "b.agiqa", changed), 4)
    np.testing.assert_array_equal(one.map, two.map)


@pytest.mark.parametrize("rank", [0, 17, 4096])
def test_a_rank_outside_the_hidden_size_is_refused(stored, rank):
    with pytest.raises(ConfigError, match=r"outside 1\.\.16"):
        basis_from(stored, rank)


def test_a_basis_of_another_language_model_head_is_refused(stored, tmp_path):
    other = make_store(tmp_path / "other.agiqa", make_content([9] * 12, seed=3))
    with pytest.raises(HeadError, match="different spaces"):
        sketch_store(stored, tmp_path / "sketch.agiqa", basis=basis_from(other, 4))
    assert not (tmp_path / "sketch.agiqa").exists()


def test_a_sketch_resumes_and_refuses_another_basis_at_its_path(stored, tmp_path):
    out = tmp_path / "sketch.agiqa"
    first = sketch_store(stored, out, basis=basis_from(stored, 4))
    again = sketch_store(stored, out, basis=basis_from(stored, 4))
    assert again.store.id == first.store.id
    with pytest.raises(SettingsConflict, match="width: stored 4, asked 5"):
        sketch_store(stored, out, basis=basis_from(stored, 5))


def test_a_sketch_answers_neither_w_lm_nor_a_second_sketch(stored, tmp_path):
    sketch = sketch_store(stored, tmp_path / "sketch.agiqa", basis=basis_from(stored, 4)).store
    with pytest.raises(ViewRefused, match="without W_lm"):
        sketch.lm_head()
    with pytest.raises(ViewRefused, match="needs the store of hidden states"):
        basis_from(sketch, 2)
