"""The spool: what was kept comes back bit by bit, and what is damaged, torn or of another conversation does not."""

from dataclasses import replace

import numpy as np
import pytest
import torch

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
