"""`agiqa store ...` on stores with layers, pooled rows, or without W_lm."""

import json

import pytest

from agiqa.store import open_store
from tests.cli.refusals import refuse
from tests.store.layered import make_layered, make_store

LENGTHS = (3, 9, 2, 5, 1, 30)


@pytest.fixture
def layered(tmp_path):
    return make_store(tmp_path / "s.agiqa", make_layered(LENGTHS, widths={"0": 5})).path


def test_info_says_what_rows_are(agiqa, layered, tmp_path):
    shown = agiqa("store", "info", layered)
    assert (shown.code, [line for line in shown.out.splitlines() if line.startswith("layers")]) == (
        0,
        ["layers              0, 3, last"],
    )
    assert "pooled" not in shown.out
    assert json.loads(agiqa("store", "info", layered, "--json").out)["layers"] == ["0", "3", "last"]
    pooled = make_store(tmp_path / "p.agiqa", make_layered(LENGTHS, pooled=("mean@image", "last"), tap="vision:12"))
    shown = agiqa("store", "info", pooled.path)
    assert "mean@image, last" in shown.out
    assert "vision:12" in shown.out


def test_every_layer_is_sketched_converted_and_exported(agiqa, layered, tmp_path):
    made = agiqa("store", "sketch", layered, tmp_path / "k.agiqa", "--rank", 3)
    assert made.code == 0
    assert "layer 0           rank 3, energy kept " in made.out
    again = agiqa("store", "sketch", layered, tmp_path / "j.agiqa", "--basis", tmp_path / "k.agiqa", "--json")
    report = json.loads(again.out)
    assert sorted(report["layers"]) == ["0", "3"]
    assert 0.5 < report["layers"]["3"]["energy_kept"] < 1.0
    first, second = (open_store(tmp_path / f"{name}.agiqa") for name in "kj")
    assert first.id == second.id
    assert agiqa("store", "convert", layered, tmp_path / "i.agiqa", "--encoding", "int8").code == 0
    assert agiqa("store", "export", tmp_path / "i.agiqa", tmp_path / "i.h5").code == 0
    assert agiqa("store", "import", tmp_path / "i.h5", tmp_path / "again.agiqa").code == 0
    checked = agiqa("store", "verify", tmp_path / "again.agiqa", "--level", "numeric")
    assert (checked.code, "sound" in checked.out) == (0, True)
    assert open_store(tmp_path / "again.agiqa").layers == ("0", "3", "last")


def test_what_a_store_without_w_lm_cannot_become(agiqa, tmp_path):
    tapped = make_store(tmp_path / "t.agiqa", make_layered(LENGTHS, tap="timm")).path
    out = tmp_path / "out.agiqa"
    refuse(agiqa("store", "convert", tapped, out, "--encoding", "logits"), tapped, "its rows are those of timm")
    refuse(agiqa("store", "sketch", tapped, out, "--rank", 2, "--method", "lm_head"), tapped, "has no W_lm")
    refuse(agiqa("store", "sketch", tapped, out, "--rank", 9), tapped, "1..8")
    assert not out.exists()
    sketched = agiqa("store", "sketch", tapped, out, "--rank", 2)
    assert (sketched.code, "of the states, since this store has no W_lm" in sketched.out) == (0, True)


def test_a_sketch_without_a_layer_gives_no_basis_for_it(agiqa, layered, tmp_path):
    plain = make_store(tmp_path / "p.agiqa", make_layered(LENGTHS, layers=("last",))).path
    assert agiqa("store", "sketch", plain, tmp_path / "k.agiqa", "--rank", 3).code == 0
    refused = agiqa("store", "sketch", layered, tmp_path / "j.agiqa", "--basis", tmp_path / "k.agiqa")
    refuse(refused, "k.agiqa has no basis for the layer 0", "--rank")
    assert not (tmp_path / "j.agiqa").exists()


def test_a_store_of_a_later_version_is_refused_by_name(agiqa, layered):
    for path in (layered / "MANIFEST.json", layered / "store.zarr" / "zarr.json"):
        found = json.loads(path.read_text())
        (found if "version" in found else found["attributes"])["version"] = 3
        path.write_text(json.dumps(found))
    refuse(
        agiqa("store", "info", layered),
        "agiqa.features v3",
        "this agiqa reads agiqa.features v1 and v2",
        "pip install -U",
    )
