"""Estimates before a model runs, against what real stores hold."""

import numpy as np
import pytest

from agiqa.extract import (
    ExtractionSettings,
    Item,
    LengthRule,
    Message,
    load_data_set,
    open_backbone,
    run_extraction,
)
from agiqa.extract.filling.footprints import PUBLISHED, ModelShape, RowsOfItems, footprints
from agiqa.extract.filling.pooling import parse_poolings
from agiqa.extract.filling.token_counts import counted
from agiqa.extract.filling.token_estimates import TokenCounts, estimated
from agiqa.store import TOKEN_ROLES, open_store
from tests.extract.jobs import extract, inputs
from tests.extract.small_sets import write_set
from tests.extract.tiny_minicpm import QUERIES, write_minicpm_checkpoint
from tests.extract.tiny_timm import needs_timm, write_weights


def item(size, text="x" * 470):
    talk = (Message(role="user", content=text),)
    return Item(name="a", prompt="p", conversation=talk, image=None, image_size=size)


@pytest.mark.parametrize(
    ("size", "slices", "marks"),
    [
        (None, 0, 0),
        ((200, 260), 1, 0),
        ((512, 512), 3, 3),  # one column of two rows, or two columns of one, and the marks around them
        ((1024, 1024), 7, 4),
    ],
)
def test_tokens_of_images_are_those_of_the_published_model(size, slices, marks):
    """The method's figures: 686 visual tokens, marks of slices included, of 1024 x 1024 pixels."""
    counts = estimated([item(size)])
    assert counts.slices is not None
    assert counts.slices.tolist() == [slices]
    assert counts.image_tokens.tolist() == [96 * slices]
    text = 1 + 100 + 5
    assert abs(int(counts.tokens[0]) - text - 98 * slices - marks) <= 1
    assert not counts.is_exact


def test_fewer_slices():
    counts = estimated([item((1024, 1024))], max_slices=4)
    assert counts.slices is not None
    assert counts.slices.tolist() == [5]


@pytest.mark.parametrize("kind", ["minicpm", "text"])
def test_counts_are_those_of_the_store(kind, tiny_text_checkpoint, tmp_path):
    checkpoint = write_minicpm_checkpoint(tmp_path / "m") if kind == "minicpm" else tiny_text_checkpoint
    folder = write_set(tmp_path / "set", 6, images=True)
    counts = counted(*inputs(folder, checkpoint), LengthRule())
    store = extract(folder, checkpoint, tmp_path / "s.agiqa").store
    assert counts.tokens.tolist() == store.n_tokens.tolist()
    roles = np.asarray(store.array("tokens/roles"))
    assert counts.image_tokens.sum() == (roles == TOKEN_ROLES["image"]).sum()
    if kind == "minicpm":
        assert counts.slices is not None
        assert (counts.slices * QUERIES).tolist() == counts.image_tokens.tolist()
    else:
        assert counts.slices is None


@pytest.mark.parametrize("encoding", ["hidden", "int8", "sketch", "logits"])
def test_bytes_per_token_are_those_of_the_arrays(encoding, tiny_text_checkpoint, tmp_path):
    folder = write_set(tmp_path / "set", 8)
    data_set, backbone = inputs(folder, tiny_text_checkpoint)
    rank = {"rank": 4} if encoding == "sketch" else {}
    path = tmp_path / "s.agiqa"
    extract(folder, tiny_text_checkpoint, path, encoding=encoding, **rank)
    store = open_store(path)
    names = ["features", "tokens/ids", "tokens/roles", *(["tokens/scale"] if encoding == "int8" else [])]
    arrays = [store.array(name) for name in names]
    stored = sum(array.dtype.itemsize * int(np.prod(array.shape[1:])) for array in arrays)
    counts = counted(data_set, backbone, LengthRule())
    found = {one.encoding: one for one in footprints(counts, ModelShape.of(backbone, "tiny"), rank=4)}
    assert found[encoding].bytes_per_token == stored
    assert found[encoding].gpu_hours is None


@needs_timm
@pytest.mark.parametrize(("layers", "poolings"), [("2", ""), ("1,3,last", "mean,max")])
def test_rows_of_an_image_encoder_are_those_of_its_layers(layers, poolings, tmp_path):
    weights = write_weights(tmp_path, "resnet10t")
    backbone = open_backbone("timm:resnet10t", weights=weights, image_size=64, device="cpu")
    data_set = load_data_set(write_set(tmp_path / "set", 3, images=True), variant="no_id", images=True)
    settings = ExtractionSettings(variant="no_id", layers=layers, pool_tokens=poolings)
    store = run_extraction(data_set, backbone, tmp_path / "s.agiqa", settings).store
    content = RowsOfItems(layers=store.layers, poolings=parse_poolings(poolings))
    counts = counted(data_set, backbone, LengthRule(), layers=store.layers)
    found = footprints(counts, ModelShape.of(backbone, "resnet10t", store.layers), rank=100, content=content)
    by_encoding = {one.encoding: one for one in found}
    assert [*by_encoding] == ["hidden", "sketch", "int8"]  # no W_lm, so no logits
    assert by_encoding["hidden"].rows == store.n_tokens.sum()
    widths = [store.layer(layer).width for layer in store.layers]
    assert by_encoding["hidden"].bytes_per_token == 4 * sum(widths) + 5
    assert by_encoding["sketch"].bytes_per_token == 2 * sum(min(width, 100) for width in widths) + 5


def test_gpu_time_is_the_measured_rate():
    """bench/LOG.md: 55 images per second, of 477 tokens and three slices each; 4.2 for raw logits."""
    many = np.full(3600, 477)
    counts = TokenCounts(tokens=many, image_tokens=many, slices=np.full(3600, 3), is_exact=True)
    found = {one.encoding: one for one in footprints(counts, PUBLISHED)}
    assert found["hidden"].gpu_hours == pytest.approx(1 / 55.3, rel=0.01)
    assert found["logits"].gpu_hours == pytest.approx(1 / 4.25, rel=0.02)
    assert found["hidden"].bytes_per_token == 4096 * 2 + 5
    assert found["hidden"].raw_bytes == 3600 * 477 * 8197 + 128_256 * 4096 * 2
