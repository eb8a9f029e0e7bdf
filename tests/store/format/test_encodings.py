"""One contract for every encoding: values come out as they went in, or with a known rounding, or are refused by name."""

import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agiqa.errors import ConfigError, DataError, UnknownName, ViewRefused
from agiqa.store import (
    Store,
    UnitWriter,
    basis_from,
    convert_store,
    create_store,
    from_float32,
    moments_of,
    open_store,
    seal,
    sketch_store,
    store_summary,
    to_float32,
    verify,
    view,
)
from agiqa.store.format.artefacts import Scale
from tests.store.conftest import Content, make_content, make_store, plan_of, unit_features, write_model


def explicit_hidden(content: Content, item: int) -> np.ndarray:
    return to_float32(content.hidden[item], content.logical_dtype).astype(np.float64)


def explicit_logits(content: Content, item: int) -> np.ndarray:
    return explicit_hidden(content, item) @ content.lm_head.T.astype(np.float64)


class EncodingContract:
    """Inherited by one class per encoding, which makes the store and says which views it has."""

    encoding: str
    answers: tuple[str, ...]
    exact = True
    tolerance = 1e-6
    """Relative error of a view's values, of their largest."""

    def make(self, path: Path, content: Content) -> Store:
        raise NotImplementedError

    @pytest.fixture
    def made(self, tmp_path, content) -> Store:
        return self.make(tmp_path / "made.agiqa", content)

    def expected(self, store: Store, content: Content, item: int, name: str) -> np.ndarray:
        del store
        return explicit_logits(content, item) if name == "logits" else explicit_hidden(content, item)

    def test_it_is_complete_sound_and_says_what_it_is(self, made):
        again = open_store(made.path)
        assert again.encoding == self.encoding
        assert verify(again, "numeric").sound
        assert store_summary(again)["encoding"] == self.encoding
        assert f"| encoding | {self.encoding}" in again.layout.card.read_text()

    def test_every_view_is_answered_as_computed_or_refused_by_name(self, made, content):
        for name in ("hidden", "logits", "sketch"):
            if name not in self.answers:
                with pytest.raises(ViewRefused, match=f"{self.encoding!r}, which has no view {name!r}"):
                    view(made, name)
                continue
            found = view(made, name)
            assert found.exact is self.exact
            for item in (0, 7, 39):
                expected = self.expected(made, content, item, name)
                assert expected.shape == (len(content.hidden[item]), found.width)
                assert np.abs(found.item(item) - expected).max() <= self.tolerance * np.abs(expected).max()
        with pytest.raises(UnknownName, match="Did you mean 'logits'"):
            view(made, "logit")

    def test_blocks_are_the_item_in_pieces(self, made):
        found = view(made, self.answers[0])
        item = int(made.n_tokens.argmax())
        blocks = list(found.blocks(item, rows=7))
        assert max(map(len, blocks)) == 7
        np.testing.assert_allclose(np.concatenate(blocks), found.item(item), rtol=1e-5, atol=1e-5)

    def test_items_are_read_in_any_order(self, made):
        order = np.random.default_rng(0).permutation(40)
        read = made.read(order)
        for place, item in enumerate(order):
            rows = read.float32()[read.offsets[place] : read.offsets[place + 1]]
            np.testing.assert_array_equal(rows, made.read([item]).float32())
        np.testing.assert_array_equal(read.roles, np.concatenate([made.read([item]).roles for item in order]))

    def test_it_says_which_language_model_head_it_belongs_to(self, made, content, tmp_path):
        assert made.lm_head_sha256 == make_store(tmp_path / "hidden.agiqa", content).lm_head_sha256

    def test_a_flipped_bit_in_any_of_its_objects_is_found(self, made):
        objects = sorted(path for path in made.layout.zarr.rglob("c/*") if path.is_file())
        objects += sorted(path for path in made.layout.zarr.rglob("c/*/0") if path.is_file())
        for path in objects:
            whole = path.read_bytes()
            path.write_bytes(bytes([*whole[:-9], whole[-9] ^ 4, *whole[-8:]]))
            damage = verify(made, "full").damage
            assert [found.where for found in damage] == [path.relative_to(made.path).as_posix()]
            path.write_bytes(whole)
        assert verify(made, "full").sound


class TestHidden(EncodingContract):
    encoding = "hidden"
    answers = ("hidden", "logits")

    def make(self, path, content):
        return make_store(path, content)

    def test_memory_of_a_logits_block_does_not_grow_with_the_item(self, tmp_path):
        store = make_store(tmp_path / "wide.agiqa", make_content([900], width=16, vocabulary=20_000))
        found = view(store, "logits")
        tracemalloc.start()
        for block in found.blocks(0, rows=16):
            assert block.shape[1] == 20_000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 * 16 * 20_000 * 4 < 900 * 20_000 * 4


class TestHiddenOfFloat16(TestHidden):
    @pytest.fixture
    def content(self):
        return make_content(np.random.default_rng(7).integers(1, 60, 40).tolist(), logical_dtype="float16")


class TestHiddenWithLogits(EncodingContract):
    """Raw logits beside the hidden states, as the model rounded them."""

    encoding = "hidden"
    answers = ("hidden", "logits")
    tolerance = 2**-8

    def make(self, path, content):
        plan = replace(plan_of(content), kept_logits=len(content.lm_head))
        store = create_store(path, plan)
        writer = UnitWriter(store)
        write_model(writer, content)
        for unit in writer.pending():
            rows = unit_features(store, content, unit)
            writer.write_unit(unit, rows, seconds=0.0, logits=self.logits(rows, content))
        return seal(store)

    def logits(self, rows, content):
        return lambda start, stop: from_float32(
            to_float32(rows[start:stop], content.logical_dtype) @ content.lm_head.T, content.logical_dtype
        )

    def test_nan_logits_are_refused_with_the_item(self, tmp_path, content):
        plan = replace(plan_of(content), kept_logits=len(content.lm_head))
        store = create_store(tmp_path / "s.agiqa", plan)
        rows = unit_features(store, content, 1)

        def logits(start, stop):
            return np.full((stop - start, len(content.lm_head)), 0x7FC0, np.uint16)

        name = content.items.names[store.items_of(1)[0]]
        with pytest.raises(DataError, match=rf"{name}.*unit 1.*token 0"):
            UnitWriter(store).write_unit(1, rows, seconds=0.0, logits=logits)
        assert store.committed_units() == []

    def test_logits_are_kept_beside_hidden_states_only(self, content):
        with pytest.raises(ConfigError, match="beside hidden states only"):
            replace(plan_of(content), encoding="sketch", kept_logits=40)


class TestSketchOfFullRank(EncodingContract):
    encoding = "sketch"
    answers = ("sketch",)
    tolerance = 2**-9

    def make(self, path, content):
        hidden = make_store(path.with_name("hidden-of-sketch.agiqa"), content)
        return sketch_store(hidden, path, basis=basis_from(hidden, 16)).store

    def expected(self, store, content, item, name):
        return explicit_logits(content, item) @ store.basis().q.astype(np.float64)


class TestInt8(EncodingContract):
    encoding = "int8"
    answers = ("hidden", "logits")
    exact = False
    tolerance = 0.02

    def make(self, path, content):
        return convert_store(make_store(path.with_name("hidden-of-int8.agiqa"), content), path, "int8")

    def test_the_error_is_at_most_half_a_step_of_its_token(self, made, content):
        scale = made.scale
        training = np.concatenate([explicit_hidden(content, item) for item in content.items.in_split("train")])
        np.testing.assert_allclose(scale.mean, training.mean(0), atol=1e-5)
        np.testing.assert_allclose(scale.rms, training.std(0), rtol=1e-4)
        for item in range(40):
            deviations = (explicit_hidden(content, item) - scale.mean) / scale.rms
            error = (made.read([item]).float32() - explicit_hidden(content, item)) / scale.rms
            step = np.abs(deviations).max(axis=1, keepdims=True) / 127
            rounding_of_float16 = 2**-11 * np.abs(explicit_hidden(content, item)) / scale.rms
            assert (np.abs(error) <= 0.5001 * step + rounding_of_float16 + 1e-6).all()

    def test_a_channel_that_never_varies_and_a_token_at_the_mean_survive(self):
        mean = np.array([1.0, 2.0], np.float32)
        scale = Scale(mean=mean, rms=np.array([1.0, 1.0], np.float32), calibration="none")
        rows, factors = scale.encode(np.array([[1.0, 2.0], [1.0, 4.0]], np.float32))
        np.testing.assert_array_equal(scale.decode(rows, factors), [[1.0, 2.0], [1.0, 4.0]])

    def test_half_the_bytes(self, made):
        hidden = open_store(made.path.with_name("hidden-of-int8.agiqa"))
        raw = [store_summary(store)["bytes_raw_features"] for store in (made, hidden)]
        assert raw[0] == raw[1] // 2

    def test_it_cannot_be_sketched(self, made, tmp_path):
        with pytest.raises(ViewRefused, match="needs the store of hidden states"):
            basis_from(made, 4)


class TestLogits(EncodingContract):
    encoding = "logits"
    answers = ("logits",)
    tolerance = 2**-8

    def make(self, path, content):
        return convert_store(make_store(path.with_name("hidden-of-logits.agiqa"), content), path, "logits")

    def test_it_has_no_language_model_head(self, made):
        with pytest.raises(ViewRefused, match="without W_lm"):
            made.lm_head()


@pytest.mark.parametrize("encoding", ["int8", "logits"])
def test_a_conversion_resumes_and_refuses_what_it_cannot_read(stored, tmp_path, encoding):
    out = tmp_path / "out.agiqa"
    whole = convert_store(stored, out, encoding)
    features = whole.read(range(40)).rows
    (out / "MANIFEST.json").unlink()
    for unit in (0, 2):
        whole.layout.commit(unit).unlink()
        shutil.rmtree(whole.layout.features_object(unit).parent)
    again = convert_store(stored, out, encoding)
    assert again.id == whole.id
    np.testing.assert_array_equal(again.read(range(40)).rows, features)
    assert verify(again, "numeric").sound
    with pytest.raises(ViewRefused):
        convert_store(again, tmp_path / "third.agiqa", "int8")
    with pytest.raises(UnknownName, match="Did you mean 'int8'"):
        convert_store(stored, tmp_path / "third.agiqa", "int4")


@pytest.mark.parametrize("blocks", [[], [np.zeros((0, 4), np.float32)]], ids=["none", "empty"])
def test_a_calibration_without_tokens_is_refused_for_any_encoding(blocks):
    with pytest.raises(ConfigError, match="A calibration needs tokens, and there are none"):
        moments_of(blocks, 4)
