"""The spool: what was kept comes back bit by bit, and what is damaged, torn or of another conversation does not."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from agiqa.errors import ConfigError
from agiqa.extract import Item, open_backbone
from agiqa.extract.describing.spool import Spool
from tests.extract.tiny_models import write_text_checkpoint

ITEM = Item(name="a.png", prompt="a dog", conversation=(), image=None, image_sha256="5" * 64)
IDS = np.arange(7, dtype=np.int32)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16, torch.float16])
def backbone(request, tmp_path_factory):
    return open_backbone(str(write_text_checkpoint(tmp_path_factory.mktemp("text"), dtype=request.param)), device="cpu")


def states_for(backbone, seed=0):
    states = torch.randn(len(IDS), backbone.hidden_size, generator=torch.Generator().manual_seed(seed))
    return states.to(getattr(torch, backbone.logical_dtype))


def kept(spool, states):
    with spool:
        spool.keep(ITEM, IDS, states)
    return next(spool.folder.iterdir())


def test_what_is_kept_comes_back(backbone, tmp_path):
    store, states = tmp_path / "s.agiqa", states_for(backbone)
    kept(Spool(store, backbone, "id"), states)
    later = Spool(store, backbone, "id")  # of another run
    found = later.read(ITEM, IDS)
    assert found.dtype == states.dtype
    assert torch.equal(found, states)
    later.remove()
    assert later.read(ITEM, IDS) is None
    assert not list(tmp_path.iterdir())


def test_another_conversation_image_or_model_has_no_rows(backbone, tmp_path):
    spool = Spool(tmp_path / "s.agiqa", backbone, "id")
    kept(spool, states_for(backbone))
    assert spool.read(ITEM, IDS[:-1]) is None
    assert spool.read(ITEM, IDS + 1) is None
    assert spool.read(replace(ITEM, image_sha256="6" * 64), IDS) is None
    assert spool.read(replace(ITEM, name="b.png"), IDS) is not None  # the same image and words under another name
    other = open_backbone(str(write_text_checkpoint(tmp_path / "model", seed=3)), device="cpu")
    assert Spool(tmp_path / "s.agiqa", other, "id").read(ITEM, IDS) is None


def test_images_that_were_not_hashed_before_are_told_apart(backbone, tmp_path):
    images = [tmp_path / "a.png", tmp_path / "b.png"]
    for image in images:
        image.write_bytes(image.name.encode())
    one, other = (replace(ITEM, image=image, image_sha256=None) for image in images)
    with Spool(tmp_path / "s.agiqa", backbone, "id") as spool:
        spool.keep(one, IDS, states_for(backbone))
    assert spool.read(one, IDS) is not None
    assert spool.read(other, IDS) is None


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_damaged_rows_are_none(backbone, tmp_path, damage):
    spool = Spool(tmp_path / "s.agiqa", backbone, "id")
    path = kept(spool, states_for(backbone))
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes({"flipped": content, "cut": content[:-9], "empty": b""}[damage])
    assert spool.read(ITEM, IDS) is None
    kept(spool, states_for(backbone, seed=1))
    assert torch.equal(spool.read(ITEM, IDS), states_for(backbone, seed=1))


def test_what_others_put_into_the_folder_stays(backbone, tmp_path):
    spool = Spool(tmp_path / "s.agiqa", backbone, "id")
    row = kept(spool, states_for(backbone))
    torn, own = row.with_name(f"{row.name}.5.partial"), row.with_name("notes.txt")  # by a kill, and by a user
    torn.touch()
    own.write_text("mine")
    assert len(spool) == 1
    spool.remove()
    assert list(spool.folder.iterdir()) == [own]
    own.unlink()
    spool.remove()
    assert not spool.folder.exists()
    spool.remove()


def test_a_folder_on_another_disk_and_a_store_without_a_name(backbone, tmp_path, monkeypatch):
    far, store = tmp_path / "far", tmp_path / "s.agiqa"
    far.mkdir()
    (tmp_path / "s.agiqa.spool").symlink_to(far)
    spool = Spool(store, backbone, "id")
    kept(spool, states_for(backbone))
    assert spool.read(ITEM, IDS) is not None
    spool.remove()
    assert not list(far.iterdir())
    store.mkdir()
    monkeypatch.chdir(store)
    assert Spool(Path(), backbone, "id").folder == tmp_path / "s.agiqa.spool"


def test_a_file_in_place_of_the_folder_is_told_before_anything_is_kept(backbone, tmp_path):
    (tmp_path / "s.agiqa.spool").write_text("mine")
    with pytest.raises(ConfigError, match=r"s\.agiqa\.spool exists and is no folder"):
        Spool(tmp_path / "s.agiqa", backbone, "id")


def test_a_run_that_is_done_removes_the_rows_of_another_one(backbone, tmp_path):
    done = Spool(tmp_path / "s.agiqa", backbone, "id")
    with Spool(tmp_path / "s.agiqa", backbone, "id") as other:
        other.keep(ITEM, IDS, states_for(backbone))
        while other.read(ITEM, IDS) is None:
            time.sleep(0.01)
        done.remove()
        other.keep(ITEM, IDS[:-1], states_for(backbone)[:-1])
    assert other.read(ITEM, IDS) is None
    assert torch.equal(other.read(ITEM, IDS[:-1]), states_for(backbone)[:-1])


def test_many_equal_conversations_at_once(backbone, tmp_path):
    with Spool(tmp_path / "s.agiqa", backbone, "id") as spool:
        for _ in range(200):
            spool.keep(ITEM, IDS, states_for(backbone))
    assert len(list(spool.folder.iterdir())) == 1
    assert torch.equal(spool.read(ITEM, IDS), states_for(backbone))


def test_a_write_that_fails_is_told(backbone, tmp_path):
    spool = Spool(tmp_path / "s.agiqa", backbone, "id")
    spool.folder.mkdir()
    taken = kept(spool, states_for(backbone))
    taken.unlink()
    taken.mkdir()  # no file can take the name of a folder
    with pytest.raises(OSError, match="directory") as raised:
        kept(spool, states_for(backbone))
    assert "keeping hidden states in" in "".join(raised.value.__notes__)
    assert [path.name for path in spool.folder.iterdir()] == [taken.name]
