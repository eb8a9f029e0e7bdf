"""Whole runs of a teacher against real servers: what is written, asked again, given to the fallback, or blamed."""

import json
from dataclasses import replace

import pytest

from agiqa.errors import RemoteError
from tests.extract.teaching.providers import (
    FALLBACK,
    MODEL,
    answer_of,
    bad_image,
    broken_json,
    dies,
    explanation,
    fails,
    refuses,
    says,
    truncated,
    unknown_model,
    wrong_key,
    wrong_schema,
)
from tests.extract.teaching.runs import (
    ITEMS,
    PRICE,
    lines_of,
    name_of,
    prompt_of,
    run,
    teacher,
)
from tests.extract.teaching.wire_formats import PROVIDERS


def test_every_item_gets_its_own_answer_and_what_the_journal_says_of_it(server, data, tmp_path):
    out = tmp_path / "teacher.jsonl"
    result = run(data, out, teacher(server, price=PRICE)).as_dict()
    assert (result["items"], result["explained"], result["asked"]) == (ITEMS, ITEMS, ITEMS)
    assert server.most_at_once <= 4
    lines = lines_of(out)
    for item in data.items:
        (request,) = server.about(item.prompt)
        assert request.images == (item.image.read_bytes(),)
        line = lines[item.name]
        assert line["explanations"] == {"quality": explanation(request, "quality_explanation")}
        assert line["id"] == request.item_id
        assert (line["status"], line["attempts"], line["model"], line["api"]) == ("ok", 1, MODEL, server.API)
        assert line["served_model"].startswith(f"{MODEL}-")
        tokens = line["tokens"]
        assert tokens["input"] == 20 + len(request.text) // 4 + 258
        assert tokens["output"] == 1 + len(line["raw"]) // 4
        assert line["cost_usd"] == pytest.approx((100 * tokens["input"] + 1000 * tokens["output"]) / 1e6)
    assert result["cost_usd"] == pytest.approx(sum(line["cost_usd"] for line in lines.values()))
    provenance = json.loads((tmp_path / "teacher.provenance.json").read_text())
    assert provenance["teacher"] == {"api": server.API, "model": MODEL}
    assert "{scores}" in provenance["question"]["text"]
    assert provenance["prices"] == {MODEL: {"input": 100.0, "output": 1000.0}}


@pytest.mark.parametrize("behaviour", [broken_json, wrong_schema, says("I like it."), truncated, fails(500)])
def test_a_broken_answer_is_asked_for_again(server, data, tmp_path, behaviour):
    server.script(behaviour, behaviour, about=prompt_of(3))
    result = run(data, tmp_path / "t.jsonl", teacher(server)).as_dict()
    assert result["explained"] == ITEMS
    assert len(server.about(prompt_of(3))) == 3
    assert lines_of(tmp_path / "t.jsonl")[name_of(3)]["attempts"] == 3


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (broken_json, "no whole JSON object"),
        (wrong_schema, "id: Field required"),
        (says("{I like it}"), "Invalid JSON"),
        (says(lambda request: json.dumps(answer_of(request) | {"id": "another"})), "the id 'another'"),
        (says(lambda request: json.dumps(answer_of(request))[:40], cut=True), "cut off after 100 tokens"),
        (says(lambda request: json.dumps(answer_of(request) | {"quality_explanation": "MOS"})), "gives away"),
    ],
)
def test_what_stays_broken_is_kept_as_failed_with_its_text(openai, data, tmp_path, behaviour, reason):
    openai.always(behaviour, about=prompt_of(5))
    out = tmp_path / "t.jsonl"
    result = run(data, out, teacher(openai, price=PRICE)).as_dict()
    assert (result["explained"], result["failed"]) == (ITEMS - 1, 1)
    assert len(openai.about(prompt_of(5))) == 3
    line = lines_of(out)[name_of(5)]
    assert (line["status"], line["explanations"]) == ("failed", {})
    assert reason in line["reason"]
    assert line["raw"]
    one = next(other for other in lines_of(out).values() if other["status"] == "ok")
    assert line["cost_usd"] > 1.5 * one["cost_usd"]  # all three answers are paid for
    assert name_of(5) not in (tmp_path / "t.quality.jsonl").read_text()


@pytest.mark.parametrize(("api", "kind"), [(api, kind) for api in PROVIDERS for kind in PROVIDERS[api].REFUSALS])
def test_a_refusal_goes_to_the_fallback(api, kind, data, tmp_path):
    with PROVIDERS[api]() as server, PROVIDERS["openai"]() as other:
        server.always(refuses(kind), about=prompt_of(2))
        out = tmp_path / "t.jsonl"
        result = run(data, out, teacher(server), teacher(other, FALLBACK)).as_dict()
        assert result["explained"] == ITEMS
        assert [request.model for request in other.requests] == [FALLBACK]
        assert len(server.about(prompt_of(2))) == 1
    line = lines_of(out)[name_of(2)]
    assert (line["status"], line["model"], line["api"]) == ("ok", FALLBACK, "openai")
    (refusal,) = line["refusals"]
    assert refusal["model"] == MODEL
    assert refusal["reason"]


def test_a_refusal_of_all_is_kept_and_asked_again_only_on_request(server, data, tmp_path):
    kind = server.REFUSALS[0]
    server.always(refuses(kind), about=prompt_of(2))
    out = tmp_path / "t.jsonl"
    first = run(data, out, teacher(server), teacher(server, FALLBACK)).as_dict()
    assert (first["explained"], first["refused"]) == (ITEMS - 1, 1)
    line = lines_of(out)[name_of(2)]
    assert [refusal["model"] for refusal in line["refusals"]] == [MODEL, FALLBACK]
    assert "PROHIBITED" in line["reason"]
    count = len(server.requests)
    run(data, out, teacher(server))
    assert len(server.requests) == count
    server.calm()
    again = run(data, out, teacher(server), retry_failed=True).as_dict()
    assert len(server.requests) == count + 1
    assert (again["asked"], again["explained"], again["refused"]) == (1, ITEMS, 0)


def test_a_later_fallback_gets_what_was_refused(server, data, tmp_path):
    """And the teacher, which is paid for refusals too, is not asked again."""
    server.always(refuses(server.REFUSALS[0]), about=prompt_of(2))
    out = tmp_path / "t.jsonl"
    assert run(data, out, teacher(server)).as_dict()["refused"] == 1
    with PROVIDERS["openai"]() as other:
        count = len(server.requests)
        again = run(data, out, teacher(server), teacher(other, FALLBACK)).as_dict()
        assert (again["asked"], again["explained"], again["refused"]) == (1, ITEMS, 0)
        assert ([request.model for request in other.requests], len(server.requests)) == ([FALLBACK], count)
    line = lines_of(out)[name_of(2)]
    assert (line["status"], [refusal["model"] for refusal in line["refusals"]]) == ("ok", [MODEL])


def test_a_rejected_image_fails_alone(server, data, tmp_path):
    server.always(bad_image, about=prompt_of(0))
    result = run(data, tmp_path / "t.jsonl", teacher(server, price=PRICE), jobs=1).as_dict()
    assert (result["explained"], result["failed"]) == (ITEMS - 1, 1)
    line = lines_of(tmp_path / "t.jsonl")[name_of(0)]
    assert "Unable to process input image" in line["reason"]
    assert line["cost_usd"] == 0.0
    assert len(server.about(prompt_of(0))) == 1


def test_an_item_that_the_server_never_serves_fails_alone(server, data, tmp_path):
    server.always(fails(500), about=prompt_of(ITEMS - 1))
    result = run(data, tmp_path / "t.jsonl", teacher(server), jobs=1).as_dict()
    assert (result["explained"], result["failed"]) == (ITEMS - 1, 1)
    assert lines_of(tmp_path / "t.jsonl")[name_of(ITEMS - 1)]["fault"] == "unserved"


@pytest.mark.parametrize("behaviour", [bad_image, fails(500)], ids=["400", "500"])
def test_a_server_that_serves_nobody_stops_the_run_and_blames_no_item(server, data, tmp_path, behaviour):
    server.always(behaviour)
    out = tmp_path / "t.jsonl"
    with pytest.raises(RemoteError, match="served none of the last 10 requests"):
        run(data, out, teacher(server), jobs=2)
    assert out.read_text() == ""
    server.calm()
    assert run(data, out, teacher(server)).as_dict()["explained"] == ITEMS


@pytest.mark.parametrize("behaviour", [bad_image, fails(500)], ids=["400", "500"])
def test_a_first_try_with_few_images_blames_none_of_them(server, data, tmp_path, behaviour):
    server.always(behaviour)
    few, out = replace(data, items=data.items[:3]), tmp_path / "t.jsonl"
    with pytest.raises(RemoteError, match="served none of the last 3 requests"):
        run(few, out, teacher(server))
    assert out.read_text() == ""
    server.calm()
    assert run(few, out, teacher(server)).as_dict()["explained"] == 3


@pytest.mark.parametrize("behaviour", [wrong_key, unknown_model], ids=["key", "model"])
def test_a_wrong_key_or_model_stops_at_once_with_nothing_spent(server, data, tmp_path, behaviour):
    server.always(behaviour)
    with pytest.raises(RemoteError, match="Check the"):
        run(data, tmp_path / "t.jsonl", teacher(server, price=PRICE))
    assert len(server.requests) <= 4  # one per thread
    assert (tmp_path / "t.jsonl").read_text() == ""


def test_a_server_that_dies_in_the_middle_costs_nothing_twice(server, data, tmp_path):
    server.script(dies, about=prompt_of(6))
    out = tmp_path / "t.jsonl"
    with pytest.raises(RemoteError, match="no connection"):
        run(data, out, teacher(server))
    done = lines_of(out)
    assert len(done) < ITEMS
    conversations = tmp_path / "t.quality.jsonl"
    assert sorted(json.loads(line)["id"] for line in conversations.read_text().splitlines()) == sorted(done)
    count = len(server.requests)
    server.start()
    result = run(data, out, teacher(server)).as_dict()
    assert (result["asked"], result["explained"]) == (ITEMS - len(done), ITEMS)
    assert len(server.requests) == count + ITEMS - len(done)
    assert {name: line for name, line in lines_of(out).items() if name in done} == done
