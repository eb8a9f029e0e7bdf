"""Descriptions by a model on a server: the questions and lines of a model that runs here, and what a server can do."""

import json
import threading
from contextlib import contextmanager

import pytest

from agiqa.errors import DataError, RemoteError, SettingsConflict
from agiqa.extract import (
    DescriptionSettings,
    GenerationSettings,
    Message,
    load_data_set,
    open_backbone,
    run_descriptions,
)
from agiqa.extract.data.images import ImageFile
from agiqa.extract.data.templates import fill, template_of
from agiqa.extract.describing.rounds import preset
from agiqa.extract.describing.served import run_served_descriptions
from agiqa.extract.models.merging import merge_adapter
from agiqa.extract.teaching.apis import OpenAIChat
from agiqa.extract.teaching.client import Client, ClientSettings, Key
from agiqa.heads.evaluation.rating_words import parse_rating_word
from tests.extract.models.test_merging import minicpm_adapter
from tests.extract.small_sets import read_table, write_set, write_table
from tests.extract.teaching.loopback import Reply
from tests.extract.teaching.providers import KEY, MODEL, bad_image, dies, explains, fails, loses, refuses, says, slow
from tests.extract.teaching.wire_formats import OpenAi, json_reply
from tests.extract.tiny_minicpm import write_minicpm_checkpoint
from tests.extract.tiny_models import roomy, write_vision_checkpoint

ITEMS = 6
RATE = template_of("quality").rate
HASTY = ClientSettings(tries=3, first_wait=0.01, longest_wait=0.02, patience=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Each image has a prompt of its own."""
    folder = write_set(tmp_path_factory.mktemp("set"), ITEMS, images=True)
    rows = [[row["name"], f"a picture of dog {number}"] for number, row in enumerate(read_table(folder))]
    return write_table(folder, rows, ["name", "prompt"])


@pytest.fixture
def server():
    """A server without a key, whose model rates every image good."""
    with OpenAi(key=None) as server:
        yield server


def rates(word="Good."):
    """`word` to the question for a rating, else an explanation."""
    return lambda server, request: (says(word) if RATE in request.text else explains)(server, request)


@contextmanager
def client_of(server, key=None, model=MODEL):
    with Client(OpenAIChat(server.base_url), model, key=key, settings=HASTY) as client:
        yield client


def run(folder, server, out, *, key=None, model=MODEL, settings="greedy", jobs=4, **options):
    describe, rate = preset(settings, max_new_tokens=50, seed=3)
    chosen = DescriptionSettings(describe=describe, rate=rate, **options)
    data_set = load_data_set(folder, variant="no_id", images=True)
    with client_of(server, key, model) as client:
        return run_served_descriptions(data_set, client, out, chosen, rating_of=parse_rating_word, jobs=jobs)


def lines_of(path):
    return {line["name"]: line for line in map(json.loads, path.read_text().splitlines())}


def test_the_questions_and_lines_are_those_of_a_model_that_runs_here(folder, server, tmp_path):
    server.default = rates()
    out = tmp_path / "served.jsonl"
    result = run(folder, server, out)
    assert (result.described, result.skipped) == (ITEMS, ())
    backbone = open_backbone(str(roomy(write_vision_checkpoint(tmp_path / "model"))), device="cpu")
    settings = DescriptionSettings(describe=preset("greedy", max_new_tokens=4)[0])
    here = tmp_path / "here.jsonl"
    run_descriptions(
        load_data_set(folder, variant="no_id", images=True), backbone, here, settings, rating_of=parse_rating_word
    )
    local, served = lines_of(here), lines_of(out)
    assert served.keys() == local.keys() == {row["name"] for row in read_table(folder)}
    wording = template_of("quality")
    for row in read_table(folder):
        line, image = served[row["name"]], (folder / "images" / row["name"]).read_bytes()
        assert line.keys() == local[row["name"]].keys()
        assert [turn["role"] for turn in line["conversations"]] == ["user", "assistant", "user"]
        assert line["conversations"][0] == local[row["name"]]["conversations"][0]
        assert line["conversations"][2] == local[row["name"]]["conversations"][2]
        assert (line["item_sha256"], line["settings"]) == (local[row["name"]]["item_sha256"], line["settings"])
        first, second = server.about(fill(wording.describe, row["prompt"]))
        assert first.turns == (("user", fill(wording.describe, row["prompt"])),)
        assert second.turns == (*first.turns, ("assistant", line["description"]), ("user", wording.rate))
        assert (first.images, second.images) == ((image,), (image,))
        assert (line["answer"], line["rating"], line["cut"]) == ("Good.", "good", False)
        given = {"prompt": first, "second_prompt": second}
        assert {name: line["tokens"][name] for name in given} == {
            name: 20 + len(request.text) // 4 + 258 for name, request in given.items()
        }
    sent = [request.body for request in server.requests]
    assert {(body["temperature"], body["model"]) for body in sent} == {(0.0, MODEL)}
    assert {body["max_tokens"] for body in sent} == {50, 16}
    assert not {"top_p", "top_k", "seed"} & set().union(*sent)
    provenance = json.loads((tmp_path / "served.provenance.json").read_text())
    assert provenance["model"] == {
        "name": MODEL,
        "kind": "server",
        "server": server.base_url,
        "api": "openai",
        "weights": "not known",
    }


def test_a_server_with_the_merged_model_writes_what_the_model_with_its_adapter_writes_here(folder, server, tmp_path):
    base = write_minicpm_checkpoint(tmp_path / "base")
    adapter = minicpm_adapter(base, tmp_path / "adapter")
    merge_adapter(str(base), str(adapter), tmp_path / "merged")
    served, lock = open_backbone(str(tmp_path / "merged"), device="cpu"), threading.Lock()
    served.load()

    def answers(one, request):
        turns = [Message(role=role, content=text) for role, text in request.turns]
        image = ImageFile(path=tmp_path / "sent.png", content=request.images[0])
        with lock:
            limit = GenerationSettings(max_new_tokens=request.body["max_tokens"])
            (answer,) = served.generate([served.prepare(turns, image, answer=True)], limit)
        return one.answer(request, str(answer), cut=not answer.complete)

    server.default = answers
    describe, rate = preset("greedy", max_new_tokens=12)
    settings = DescriptionSettings(describe=describe, rate=rate)
    data_set, out, here = (
        load_data_set(folder, variant="no_id", images=True),
        tmp_path / "a.jsonl",
        tmp_path / "b.jsonl",
    )
    with client_of(server) as client:
        run_served_descriptions(data_set, client, out, settings, rating_of=parse_rating_word)
    backbone = open_backbone(str(base), adapter=str(adapter), device="cpu")
    run_descriptions(data_set, backbone, here, settings, rating_of=parse_rating_word)
    compared = ("description", "answer", "rating", "cut", "conversations", "response_0", "response_1", "item_sha256")
    found, expected = (
        {name: {key: line[key] for key in compared} for name, line in lines_of(path).items()} for path in (out, here)
    )
    assert found == expected
    assert len({line["description"] for line in found.values()}) > 1


def test_published_sampling_is_sent_as_far_as_the_format_has_it(folder, server, tmp_path):
    out = tmp_path / "out.jsonl"
    run(folder, server, out, settings="published")
    bodies = [request.body for request in server.requests]
    assert {(body["temperature"], body["top_p"]) for body in bodies} == {(0.7, 0.8)}
    assert len({body["seed"] for body in bodies}) == 2 * ITEMS
    assert all(0 <= body["seed"] < 2**31 for body in bodies)
    recorded = json.loads((tmp_path / "out.provenance.json").read_text())["settings"]["describe"]
    assert (recorded["temperature"], recorded["top_k"], recorded["repetition_penalty"]) == (0.7, 0, 1.0)
    with OpenAi(key=None) as other:
        run(folder, other, tmp_path / "again.jsonl", settings="published", jobs=1)
        seeds = {request.body["seed"] for request in other.requests}
    assert seeds == {body["seed"] for body in bodies}


def test_images_are_asked_about_at_the_same_time(folder, server, tmp_path):
    server.default = slow(rates())
    thread = threading.Thread(target=run, args=(folder, server, tmp_path / "out.jsonl"), kwargs={"jobs": 3})
    thread.start()
    server.wait_for(3)
    server.release()
    thread.join()
    assert server.most_at_once == 3
    assert len(lines_of(tmp_path / "out.jsonl")) == ITEMS


def test_items_without_an_answer_are_named_and_asked_about_again(folder, server, tmp_path):
    prompts = [row["prompt"] for row in read_table(folder)]
    names = [row["name"] for row in read_table(folder)]
    server.script(refuses("content_filter"), about=prompts[0])
    server.script(bad_image, about=prompts[1])
    server.script(explains, refuses("refusal"), about=prompts[2])
    server.script(says(""), about=prompts[3])
    server.script(fails(500), loses(), explains, about=prompts[4])
    out = tmp_path / "out.jsonl"
    result = run(folder, server, out, on_bad_item="skip")
    problems = {line.partition(":")[0]: line for line in result.skipped}
    assert problems.keys() == set(names[:4])
    assert "the server refuses to answer: content_filter: PROHIBITED_CONTENT" in problems[names[0]]
    assert "Unable to process input image" in problems[names[1]]
    assert "I cannot help with that" in problems[names[2]]
    assert "the model's description is empty" in problems[names[3]]
    assert lines_of(out).keys() == set(names[4:])
    before = len(server.requests)
    assert run(folder, server, out).described == 4
    assert len(server.requests) == before + 8
    assert lines_of(out).keys() == set(names)


def test_a_bad_item_stops_the_run_unless_it_may_be_skipped(folder, server, tmp_path):
    server.always(refuses("content_filter"), about=read_table(folder)[2]["prompt"])
    with pytest.raises(DataError, match=r"002\.png: the server refuses"):
        run(folder, server, tmp_path / "out.jsonl", jobs=1)
    assert lines_of(tmp_path / "out.jsonl").keys() == {"000.png", "001.png"}
    server.always(bad_image)
    with pytest.raises(DataError, match="6 problems"):
        run(folder, server, tmp_path / "none.jsonl", on_bad_item="skip")


def test_a_server_that_goes_away_keeps_what_it_has_answered(folder, server, tmp_path):
    prompts = [row["prompt"] for row in read_table(folder)]
    server.script(dies, about=prompts[3])
    out = tmp_path / "out.jsonl"
    with pytest.raises(RemoteError, match="chat/completions: "):
        run(folder, server, out, jobs=1)
    assert lines_of(out).keys() == {"000.png", "001.png", "002.png"}
    server.start()
    assert run(folder, server, out).described == 3
    assert lines_of(out).keys() == {row["name"] for row in read_table(folder)}


def test_keys_and_names_that_the_server_does_not_know_stop_at_once(folder, tmp_path):
    with OpenAi() as server:
        for key, model, match in (
            (None, MODEL, "Name the environment variable"),
            (Key(variable="WRONG", value="wrong-key"), MODEL, "Check the key in the environment variable WRONG"),
            (Key(variable="RIGHT", value=KEY), "other", "Check the name of the model, 'other'"),
        ):
            before = len(server.requests)
            with pytest.raises(RemoteError, match=match):
                run(folder, server, tmp_path / "out.jsonl", key=key, model=model, jobs=1)
            assert len(server.requests) == before + 1
        assert (tmp_path / "out.jsonl").read_text() == ""
        run(folder, server, tmp_path / "out.jsonl", key=Key(variable="RIGHT", value=KEY))
    assert all(KEY not in path.read_text() for path in tmp_path.iterdir())


def test_the_lines_of_another_server_are_not_mixed_with_these(folder, server, tmp_path):
    run(folder, server, tmp_path / "out.jsonl")
    with OpenAi(key=None) as other, pytest.raises(SettingsConflict, match=r"model\.server was 'http"):
        run(folder, other, tmp_path / "out.jsonl")


def test_thoughts_are_kept_apart(folder, server, tmp_path):
    server.default = says("<think>Is it sharp?</think>\n\nA sharp image.")
    out = tmp_path / "out.jsonl"
    run(folder, server, out)
    line = lines_of(out)["000.png"]
    assert (line["description"], line["answer"]) == ("A sharp image.", "A sharp image.")
    assert line["generated"]["describe"] == "<think>Is it sharp?</think>\n\nA sharp image."
    assert {request.body["max_tokens"] for request in server.requests} == {50}
    server.default = says("<think>Is it", cut=True)
    with pytest.raises(DataError, match="still thinking after"):
        run(folder, server, tmp_path / "cut.jsonl")


def test_a_cut_description_is_marked(folder, server, tmp_path):
    server.default = lambda one, request: says("It is", cut=RATE not in request.text)(one, request)
    run(folder, server, tmp_path / "out.jsonl")
    assert all(line["cut"] for line in lines_of(tmp_path / "out.jsonl").values())


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_thoughts_that_a_server_sends_apart(folder, server, tmp_path, field):
    """The rating of a model that thinks may then take as many tokens as its description."""

    def thinks(text, *, cut=False):
        def reply(one, request):
            answer = json.loads(says(text, cut=cut)(one, request).body)
            answer["choices"][0]["message"] |= {"content": text or None, field: "Is it sharp?"}
            return json_reply(answer)

        return reply

    server.default = thinks("A sharp image.")
    run(folder, server, tmp_path / "out.jsonl")
    line = lines_of(tmp_path / "out.jsonl")["000.png"]
    assert line["description"] == "A sharp image."
    assert line["generated"] == dict.fromkeys(("describe", "rate"), "Is it sharp?\nA sharp image.")
    assert {request.body["max_tokens"] for request in server.requests} == {50}
    server.default = thinks("", cut=True)
    with pytest.raises(DataError, match="still thinking after"):
        run(folder, server, tmp_path / "cut.jsonl")


def test_half_a_character_is_no_reason_to_stop(folder, server, tmp_path):
    server.default = says("A dog \ud83d")
    run(folder, server, tmp_path / "out.jsonl")
    assert {line["description"] for line in lines_of(tmp_path / "out.jsonl").values()} == {"A dog ?"}
    server.default = says("A dog \ud83d\udc36")
    run(folder, server, tmp_path / "whole.jsonl")
    assert {line["description"] for line in lines_of(tmp_path / "whole.jsonl").values()} == {"A dog \U0001f436"}


def test_what_a_server_says_about_a_request_is_passed_on(folder, server, tmp_path):
    fault = [{"loc": ["body", "messages"], "msg": "no images here"}]
    server.default = lambda *_: json_reply({"detail": fault}, 422)
    with pytest.raises(DataError, match="no images here"):
        run(folder, server, tmp_path / "out.jsonl")
    server.default = lambda *_: Reply(body=b"<!DOCTYPE html><p>Welcome")
    with pytest.raises(DataError, match="no answer of the server: a web page"):
        run(folder, server, tmp_path / "out.jsonl")
