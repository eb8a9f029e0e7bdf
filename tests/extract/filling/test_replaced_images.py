"""Images replaced during a run: errors name them, and no features are stored under the old item key."""

import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from PIL import Image

from agiqa.errors import DataError, SettingsConflict
from agiqa.extract import DescriptionSettings, GenerationSettings, LengthRule, Message, open_backbone, run_descriptions
from agiqa.extract.data.datasets import items_of_images
from agiqa.extract.filling.engines import Here, ModelProcess, OnDevices
from agiqa.extract.filling.live import LiveFeatures
from agiqa.extract.filling.plan import store_plan, tokenise
from agiqa.extract.filling.targets import Target
from agiqa.extract.models.preparing import Preparation
from agiqa.heads.evaluation.rating_words import parse_rating_word
from agiqa.store import create_store, verify
from tests.extract.jobs import extract, inputs
from tests.extract.small_sets import save_noise, write_set, write_talks
from tests.extract.tiny_models import roomy, write_vision_checkpoint

MESSAGE = r"003\.png: the image file was replaced or changed during this run\. Restore the file"


@pytest.fixture
def folder(tmp_path):
    folder = write_set(tmp_path / "set", 8, images=True)
    write_talks(folder)
    return folder


def replace_image(path, *, size=(40, 32)):
    """Another picture under the same name; with the same size it has the same tokens."""
    noise = np.random.default_rng(99).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(path)


def planned(folder, checkpoint, path):
    data_set, backbone = inputs(folder, checkpoint)
    tokenised = tokenise(data_set, backbone, LengthRule())
    conversation, target = {"variant": "id", "aspect": "quality"}, Target(encoding="hidden")
    plan = store_plan(data_set, backbone, tokenised, rule=LengthRule(), conversation=conversation, target=target)
    store = create_store(path, plan)
    return store, backbone, tokenised.planned, target


def engine_of(name, backbone, checkpoint):
    opener = partial(open_backbone, str(checkpoint))
    if name == "devices":
        process = ModelProcess(opener=opener, device="cpu", workers=0, processes=2, batch_size=1)
        return OnDevices(process=process, devices=["cpu", "cpu"])
    workers = 1 if name == "worker" else 0
    return Here(backbone=backbone, preparation=Preparation(backbone, workers=workers, opener=opener), batch_size=1)


@pytest.mark.parametrize(
    ("name", "size"), [("here", (40, 32)), ("here", (64, 64)), ("worker", (40, 32)), ("devices", (40, 32))]
)
def test_replaced_between_plan_and_fill(folder, tiny_vision_checkpoint, tmp_path, name, size):
    path, picture = tmp_path / "s.agiqa", folder / "images" / "003.png"
    store, backbone, items, target = planned(folder, tiny_vision_checkpoint, path)
    content = picture.read_bytes()
    replace_image(picture, size=size)
    engine = engine_of(name, backbone, tiny_vision_checkpoint)
    with pytest.raises(DataError, match=MESSAGE) as caught:
        engine.fill(store, items, target, part=(1, 1), advance=lambda _items: None)
    assert "while reading item '003.png'" in caught.value.__notes__
    if name == "worker":
        engine.preparation.close()
    assert int(store.units[store.items.names.index("003.png")]) not in store.committed_units()
    picture.write_bytes(content)
    assert verify(extract(folder, tiny_vision_checkpoint, path).store, "numeric").sound


def test_replaced_during_the_fill_and_before_the_next_run(folder, tiny_vision_checkpoint, tmp_path):
    path, picture = tmp_path / "s.agiqa", folder / "images" / "003.png"
    store, backbone, items, target = planned(folder, tiny_vision_checkpoint, path)
    engine = engine_of("here", backbone, tiny_vision_checkpoint)
    content = picture.read_bytes()

    def replace_it(_items):
        if picture.read_bytes() == content:
            replace_image(picture)

    with pytest.raises(DataError, match=MESSAGE):
        engine.fill(store, items, target, part=(1, 1), advance=replace_it)
    assert 0 < len(store.committed_units()) < store.geometry.units
    with pytest.raises(SettingsConflict, match=r"changed items: 003\.png"):
        extract(folder, tiny_vision_checkpoint, path)
    picture.write_bytes(content)
    assert extract(folder, tiny_vision_checkpoint, path).store.is_sealed


def test_replaced_between_the_check_and_the_plan(folder, tiny_vision_checkpoint):
    data_set, backbone = inputs(folder, tiny_vision_checkpoint)
    replace_image(folder / "images" / "003.png")
    with pytest.raises(DataError, match=MESSAGE):
        tokenise(data_set, backbone, LengthRule())
    kept = tokenise(data_set, backbone, LengthRule(on_bad_item="skip"))
    assert [re.search(MESSAGE, line) is not None for line in kept.skipped] == [True]
    assert len(kept.items) == 7


class ReplacesAfter:
    """A real backbone that replaces a file after a given number of calls of `generate`."""

    def __init__(self, backbone, path, calls):
        self._backbone, self._path, self._left = backbone, path, calls

    def __getattr__(self, name):
        return getattr(self._backbone, name)

    def generate(self, batch, settings, *, seeds=None):
        answers = self._backbone.generate(batch, settings, seeds=seeds)
        self._left -= 1
        if self._left == 0:
            replace_image(self._path)
        return answers


@pytest.mark.parametrize("calls", [1, 2], ids=["between its rounds", "before its first question"])
def test_descriptions_are_of_the_image_that_their_key_is_of(tmp_path, calls):
    checkpoint = roomy(write_vision_checkpoint(tmp_path / "model"))
    folder, out = write_set(tmp_path / "set", 4, images=True), tmp_path / "d.jsonl"
    short = GenerationSettings(max_new_tokens=2)
    settings = DescriptionSettings(describe=short, rate=short, batch_size=2, on_bad_item="fail")
    data_set, backbone = inputs(folder, checkpoint, variant="no_id")
    order = sorted(data_set.items, key=lambda item: -len(backbone.prepare(item.conversation, item.image).token_ids))
    picture = order[0 if calls == 1 else -1].image
    content = picture.read_bytes()
    hostile = ReplacesAfter(backbone, picture, calls)
    with pytest.raises(DataError, match="the image file was replaced or changed during this run"):
        run_descriptions(data_set, hostile, out, settings, rating_of=parse_rating_word)
    picture.write_bytes(content)
    result = run_descriptions(data_set, backbone, out, settings, rating_of=parse_rating_word)
    assert len(result.lines) == 4


def test_an_image_replaced_before_it_is_scored_is_refused(tiny_vision_checkpoint, tmp_path):
    save_noise(tmp_path / "003.png", seed=1)
    items, problems = items_of_images([tmp_path / "003.png"], prompt="a cat", table=None)
    assert problems == {}
    backbone = open_backbone(str(tiny_vision_checkpoint), device="cpu")
    items = [replace(item, conversation=(Message(role="user", content="What is it?"),)) for item in items]
    features = LiveFeatures(backbone, Target(encoding="hidden"), name="here")
    replace_image(tmp_path / "003.png")
    with pytest.raises(DataError, match=MESSAGE):
        features.replace(items)
