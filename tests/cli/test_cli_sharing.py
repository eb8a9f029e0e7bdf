"""`agiqa store push` and `agiqa store pull` as their users and scripts see them."""

import json

import pytest

from agiqa.store import open_store, verify
from tests.command_line import in_time
from tests.store.conftest import make_content, make_store
from tests.store.sharing_servers import web_server


@pytest.fixture
def stored(tmp_path):
    return make_store(tmp_path / "small.agiqa", make_content([37] * 60))


def object_bytes(store):
    manifest = json.loads(store.layout.manifest.read_text())
    return sum(entry["bytes"] for entry in [*manifest["objects"], manifest["labels"]])


def test_push_and_pull_tell_what_they_moved(agiqa, stored, tmp_path):
    there = (tmp_path / "there").as_uri()
    sent = agiqa("store", "push", stored.path, there, "--json").json
    assert (sent["id"], sent["url"], sent["state"], sent["skipped"]) == (stored.id, there, "complete", 0)
    assert sent["bytes"] >= object_bytes(stored)
    again = agiqa("store", "push", stored.path, there, "--json").json
    assert (again["objects"], again["bytes"], again["skipped"]) == (0, 0, sent["objects"] - 1)
    pulled = agiqa("store", "pull", there, tmp_path / "copy.agiqa", "--json").json
    assert pulled["bytes"] == object_bytes(stored)
    assert pulled["state"] == "complete"
    assert pulled["seconds"] > 0
    assert verify(open_store(tmp_path / "copy.agiqa"), "full").sound


def test_progress_is_in_bytes_and_the_result_readable(agiqa, stored, tmp_path):
    outcome = agiqa("store", "push", stored.path, (tmp_path / "there").as_uri())
    total = object_bytes(stored)
    assert f"push: {total}/{total} bytes" in outcome.err
    assert "complete" in outcome.out


def test_a_killed_push_is_finished_by_the_same_command(agiqa, stored, tmp_path):
    there = tmp_path / "there"
    arguments = ("store", "push", stored.path, there.as_uri(), "--jobs", 1)
    begun = there / "store.zarr" / "zarr.json"
    killed = in_time(lambda: agiqa.killed(*arguments, when=begun.exists), there)
    assert killed.code == -9
    assert not (there / "MANIFEST.json").exists()
    assert agiqa(*arguments, "--json").json["skipped"] >= 1
    assert verify(open_store(there), "full").sound


def test_items_are_named_one_by_one_or_in_a_file(agiqa, stored, tmp_path):
    names = [stored.items.names[int(stored.items_of(unit)[0])] for unit in (1, 3)]
    (tmp_path / "names.txt").write_text(f"{names[1]}\n\n")
    copy = tmp_path / "copy.agiqa"
    with web_server(stored.path) as server:
        part = agiqa("store", "pull", server.url, copy, "--items", names[0], "--json").json
        assert part["state"] == "partial"
        assert part["bytes"] < object_bytes(stored)
        assert json.loads((copy / "MANIFEST.json").read_text())["units"] == [1]
        agiqa("store", "pull", server.url, copy, "--items", f"@{tmp_path / 'names.txt'}", "--json")
        assert json.loads((copy / "MANIFEST.json").read_text())["units"] == [1, 3]
        unknown = agiqa("store", "pull", server.url, copy, "--items", "image_x.png")
        assert unknown.code == 1
        assert "image_x.png" in unknown.err
        nowhere = agiqa("store", "pull", server.url, copy, "--items", f"@{tmp_path / 'nowhere.txt'}")
        assert nowhere.code == 1
        assert "nowhere.txt" in nowhere.err
        assert agiqa("store", "pull", server.url, copy, "--json").json["state"] == "complete"
    assert verify(open_store(copy), "full").sound


def test_damage_at_the_url_is_one_message(agiqa, stored, tmp_path):
    with web_server(stored.path) as server:
        name = "store.zarr/features/c/2/0"
        server.behaviour.wrong = {name}
        outcome = agiqa("store", "pull", server.url, tmp_path / "copy.agiqa")
    assert outcome.code == 1
    assert f"{server.url}/{name} is damaged" in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("pull", "s4://bucket/x", "copy.agiqa"), "Did you mean 's3'?"),
        (("pull", "some/folder", "copy.agiqa"), "is a path, not a URL"),
    ],
)
def test_what_is_no_url_is_refused(agiqa, arguments, words):
    outcome = agiqa("store", *arguments)
    assert outcome.code == 1
    assert words in outcome.err
