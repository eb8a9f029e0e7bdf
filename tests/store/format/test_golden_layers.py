"""agiqa, and a reader written from FORMAT.md alone, read the stores of version 2 that were committed."""

import tarfile
from pathlib import Path

import numpy as np
import pytest

from agiqa.errors import IncompleteStore
from agiqa.store import open_store, verify
from tests.store import golden_layers as golden
from tests.store.format.test_golden import in_bits
from tests.store.independent_reader import IndependentReader, NotThere
from tests.store.layered import lm_head


def unpack(kind: str, folder: Path) -> Path:
    with tarfile.open(golden.FOLDER / f"v2-{kind}.tar.gz") as file:
        file.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return folder / f"{kind}.agiqa"


@pytest.fixture(params=golden.KINDS)
def unpacked(request, tmp_path) -> tuple[str, Path]:
    return request.param, unpack(request.param, tmp_path)


def test_agiqa_reads_it(unpacked):
    kind, folder = unpacked
    store, content = open_store(folder, allow_partial=True), golden.content(kind)
    report = verify(store, "numeric")
    assert (report.sound, report.damage) == (kind != "layers-unfinished", ())
    assert (store.layers, store.pooled, store.tap) == (content.layers, tuple(content.pooled), content.tap)
    assert store.attributes["version"] == 2
    for layer in content.layers:
        if (kind, layer) == ("layers-logits", "last"):
            continue
        source = store.layer(layer)
        for item in golden.readable(kind):
            found, states = source.read([item]).float32(), content.states[layer][item]
            if kind == "layers-sketch":
                basis = source.basis()
                lifted = states if layer != "last" else states @ lm_head().T
                np.testing.assert_allclose(found, lifted @ basis.q, atol=2e-2)
            else:
                np.testing.assert_allclose(found, states, atol=0.03 if kind == "layers-int8" else 0)


def test_a_reader_made_from_the_specification_agrees_to_the_bit(unpacked):
    kind, folder = unpacked
    store, other = open_store(folder, allow_partial=True), IndependentReader(folder, finished_part=True)
    assert (tuple(other.layers), tuple(other.pooled)) == (store.layers, store.pooled)
    assert other.has_lm_head == bool(store.lm_head_sha256)
    for item in golden.readable(kind):
        for layer in store.layers:
            here = store.layer(layer).read([item])
            assert in_bits(other.layer(item, layer)) == in_bits(here.rows)
            assert in_bits(other.floats(other.layer(item, layer), other.layer_dtype(layer))) == in_bits(here.float32())
    for array in store.probe_arrays:
        assert in_bits(other.whole(array)) == in_bits(store.whole(array))
    for item in set(range(len(golden.LENGTHS))) - {*golden.readable(kind)}:
        with pytest.raises(NotThere):
            other.layer(item, "0")
        with pytest.raises(IncompleteStore):
            store.layer("0").read([item])


def test_ids_of_bases_follow_from_their_content(tmp_path):
    folder = unpack("layers-sketch", tmp_path)
    store, other = open_store(folder), IndependentReader(folder)
    ids = {layer: other.basis_id(layer) for layer in ("0", "10")}
    assert store.provenance["layer_bases"] == ids == {layer: basis.id for layer, basis in store.layer_bases().items()}
    assert store.provenance["basis"] == other.basis_id() == store.basis().id


def test_ids_of_scales_follow_from_their_content(tmp_path):
    folder = unpack("layers-int8", tmp_path)
    store, other = open_store(folder), IndependentReader(folder)
    ids = {layer: other.scale_id(layer) for layer in ("0", "10")}
    assert store.provenance["layer_scales"] == ids == {layer: store.layer_scale(layer).id for layer in ids}
    assert store.provenance["scale"] == other.scale_id() == store.layer_scale("last").id


@pytest.mark.parametrize("kind", golden.KINDS)
def test_todays_stores_have_the_layout_of_the_golden_ones(kind, tmp_path):
    made = golden.write(kind, tmp_path / f"{kind}.agiqa").path
    with tarfile.open(golden.FOLDER / f"v2-{kind}.tar.gz") as file:
        names = {member.name.partition("/")[2] for member in file.getmembers() if member.isfile()}
    assert {path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file()} == names
