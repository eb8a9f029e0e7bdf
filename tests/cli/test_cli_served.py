"""`agiqa describe --server`, as a user calls it: a kill, and the way of the lines to features and metrics."""

import json
from collections import Counter

import pytest

from agiqa.extract.data.templates import template_of
from tests.cli.refusals import misuse, refuse
from tests.extract.small_sets import read_table, write_set
from tests.extract.teaching.providers import KEY, MODEL, explains, says, slow
from tests.extract.teaching.wire_formats import OpenAi

ITEMS = 12
RATE = template_of("quality").rate


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set"), ITEMS, images=True)


@pytest.fixture
def server():
    with OpenAi(key=None) as server:
        server.default = lambda one, request: (says("good") if RATE in request.text else explains)(one, request)
        yield server


def written(path):
    """Whole lines of the file."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_killed_run_resumes_and_its_lines_become_features_and_metrics(
    agiqa, data, server, tiny_text_checkpoint, tmp_path
):
    out = tmp_path / "out.jsonl"
    arguments = ("describe", data, out, "--server", server.base_url, "--model", MODEL, "--jobs", 2, "--json")
    answering, server.default = server.default, slow(server.default)
    server.always(answering, about=read_table(data)[0]["prompt"])  # of the first two items
    killed = agiqa.killed(*arguments, when=lambda: len(server.requests) >= 6 and written(out) == 2)
    assert killed.code == -9, killed.err
    kept = {line["name"] for line in lines_of(out)}
    assert kept == {"000.png", "001.png"}
    server.release()
    before = Counter(request.images for request in server.requests)
    printed = agiqa(*arguments).json
    assert (printed["items"], printed["described"], printed["ratings"]) == (ITEMS, ITEMS - len(kept), {"good": ITEMS})
    asked = Counter(request.images for request in server.requests)
    for row in read_table(data):
        image = ((data / "images" / row["name"]).read_bytes(),)
        assert asked[image] - before[image] == (0 if row["name"] in kept else 2)

    store = tmp_path / "s.agiqa"
    model = ("--model", tiny_text_checkpoint, "--device", "cpu", "--conversations", out)
    assert agiqa("extract", data, store, *model, "--json").json["items"] == ITEMS
    scores = agiqa("words", out, "--labels", data / "data.csv", "--json").json
    assert (scores["n"], scores["unknown"]) == (ITEMS, 0)


def test_ctrl_c_ends_at_once_and_keeps_the_lines(agiqa, data, server, tmp_path):
    """Also while an answer is on its way, which this server never sends."""
    out = tmp_path / "out.jsonl"
    answering, server.default = server.default, slow(server.default)
    server.always(answering, about=read_table(data)[0]["prompt"])
    stopped = agiqa.interrupted(
        *("describe", data, out, "--server", server.base_url, "--model", MODEL),
        when=lambda: len(server.requests) >= 4 + 8 and written(out) == 2,
    )
    assert stopped.code == 130, stopped.err
    assert "finished work is kept" in stopped.err
    assert {line["name"] for line in lines_of(out)} == {"000.png", "001.png"}


def test_options_that_have_no_effect_are_wrong_usage(agiqa, data, tmp_path):
    out = tmp_path / "out.jsonl"
    served = ("describe", data, out, "--model", MODEL, "--server", "http://127.0.0.1:9/v1")
    misuse(agiqa(*served, "--adapter", "a"), "--adapter is for a model that agiqa runs itself; leave it out.")
    misuse(agiqa(*served, "--dtype", "float32"), "--dtype is for")
    misuse(agiqa(*served, "--prepare-workers", 1), "--prepare-workers is for")
    here = ("describe", data, out, "--model", data)
    misuse(agiqa(*here, "--jobs", 2), "--jobs needs --server; leave it out, or give --server.")
    misuse(agiqa(*here, "--key-env", "X"), "--key-env needs --server")
    assert not out.exists()


def test_servers_that_cannot_be_asked(agiqa, data, server, tmp_path):
    out = tmp_path / "out.jsonl"
    given = ("describe", data, out, "--model", MODEL, "--json", "--server")
    secret = agiqa(*given, server.base_url.replace("http://", "http://user:hidden-word@"))
    refuse(secret, "URL")
    assert "hidden-word" not in secret.err
    assert [path.name for path in tmp_path.iterdir()] == []
    refuse(agiqa(*given, server.base_url, "--key-env", "NO_SUCH_KEY"), "NO_SUCH_KEY has none")
    refuse(agiqa(*given, "localhost:8000"), "localhost:8000", "http://")
    server.key = KEY
    refuse(agiqa(*given, server.base_url), server.base_url, "Name the environment variable that holds the key")
    server.key = None
    refuse(agiqa("describe", data, out, "--model", "other", "--server", server.base_url), "The model `other` does not")


def test_published_sampling_says_what_the_server_is_not_told(agiqa, data, server, tmp_path):
    given = ("describe", data, tmp_path / "out.jsonl", "--model", MODEL, "--server", server.base_url)
    shown = agiqa(*given, "--settings", "published")
    assert shown.code == 0, shown.err
    assert "OpenAI's format has no top_k and no repetition penalty" in shown.err
    assert "described  12" in shown.out
