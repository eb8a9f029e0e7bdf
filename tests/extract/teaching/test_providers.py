"""The loopback providers answer as scripted, and check what a real provider checks."""

import base64
import json
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from tests.extract.teaching.providers import (
    MODEL,
    bad_image,
    broken_json,
    dies,
    explains,
    explanation,
    fails,
    rate_limited,
    refuses,
    says,
    slow,
    truncated,
    unknown_model,
    wrong_key,
)
from tests.extract.teaching.wire_formats import Gemini, OpenAi

PNG = b"\x89PNG, and the rest"


def ask(server, text, *, key=None, model=MODEL, timeout=30.0, **more):
    """One request in the server's format, written down here independently of agiqa."""
    schema = {
        "type": "object",
        "properties": {"item_id": {"type": "string"}, "quality_explanation": {"type": "string"}},
    }
    data = base64.b64encode(PNG).decode()
    if server.API == "openai":
        parts = [
            {"type": "text", "text": text},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        ]
        strict = {"required": list(schema["properties"]), "additionalProperties": False}
        form = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema | strict}}
        body = {"model": model, "messages": [{"role": "user", "content": parts}], "response_format": form}
        url, headers = f"{server.base_url}/chat/completions", {"Authorization": f"Bearer {key or server.key}"}
    else:
        parts = [{"text": text}, {"inlineData": {"mimeType": "image/png", "data": data}}]
        config = {"responseMimeType": "application/json", "responseSchema": schema}
        body = {"contents": [{"role": "user", "parts": parts}], "generationConfig": config}
        url, headers = f"{server.base_url}/models/{model}:generateContent", {"x-goog-api-key": key or server.key}
    return httpx2.post(url, headers=headers, json=body | more, timeout=timeout)


def text_of(server, response):
    body = response.json()
    if server.API == "openai":
        return body["choices"][0]["message"]["content"]
    return body["candidates"][0]["content"]["parts"][0]["text"]


def test_an_answer_has_the_schema_the_id_and_the_usage(server):
    response = ask(server, "Explain this. The item's id: a-7.")
    request = server.requests[0]
    assert request.images == (PNG,)
    assert request.turns == (("user", "Explain this. The item's id: a-7."),)
    expected = {"item_id": "a-7", "quality_explanation": explanation(request, "quality_explanation")}
    assert json.loads(text_of(server, response)) == expected
    body = response.json()
    assert (
        body["usage"]["prompt_tokens"] if server.API == "openai" else body["usageMetadata"]["promptTokenCount"]
    ) == 286


def test_scripts_are_by_text_and_in_order(server):
    server.script(rate_limited(3), fails(503), about="fox")
    server.always(says("{}"), about="door")
    assert [ask(server, text).status_code for text in ("fox", "a tree", "fox", "fox")] == [429, 200, 503, 200]
    assert [text_of(server, ask(server, "door")) for _ in range(2)] == ["{}", "{}"]
    assert [request.text for request in server.about("fox")] == ["fox"] * 3


@pytest.mark.parametrize(("behaviour", "status"), [(unknown_model, 404), (bad_image, 400), (broken_json, 200)])
def test_scripted_errors(server, behaviour, status):
    server.script(behaviour)
    response = ask(server, "a fox")
    assert response.status_code == status
    assert ("error" in response.json()) == (status != 200)


def test_keys_models_and_fields_are_checked_without_a_script(server):
    expected = 401 if server.API == "openai" else 400
    assert ask(server, "a fox", key="another").status_code == expected
    server.script(wrong_key)
    assert ask(server, "a fox").status_code == expected
    assert ask(server, "a fox", model="teacher-9").status_code == 404
    assert ask(server, "a fox", safety_settings=[]).status_code == 400  # neither provider has a field of this name


def test_every_refusal_has_no_text(server):
    for kind in server.REFUSALS:
        server.script(refuses(kind))
        assert "details worth" not in ask(server, "a fox").text


def test_transport_faults(server):
    server.script(truncated, dies)
    with pytest.raises(httpx2.RemoteProtocolError):
        ask(server, "a fox")
    with pytest.raises(httpx2.RemoteProtocolError):
        ask(server, "a fox")
    with pytest.raises(httpx2.ConnectError):
        ask(server, "a fox")
    server.start()
    assert ask(server, "a fox").status_code == 200


def test_a_slow_reply_waits_for_the_test(server):
    server.script(slow(explains))
    with pytest.raises(httpx2.ReadTimeout):
        ask(server, "a fox", timeout=0.2)
    with ThreadPoolExecutor() as pool:
        server.script(slow(explains))
        waiting = pool.submit(ask, server, "a fox")
        server.wait_for(2)
        assert not waiting.done()
        server.release()
        assert waiting.result().status_code == 200


def test_plain_chat_of_several_turns():
    with OpenAi() as server:
        server.default = says(lambda request: f"answer to {request.turns[-1][1]}")
        turns = [("user", "describe"), ("assistant", "a fox"), ("user", "rate")]
        body = {"model": MODEL, "messages": [{"role": role, "content": text} for role, text in turns]}
        headers = {"Authorization": f"Bearer {server.key}"}
        response = httpx2.post(f"{server.base_url}/chat/completions", headers=headers, json=body)
        assert text_of(server, response) == "answer to rate"
        assert server.requests[0].turns == tuple(turns)


def test_gemini_tells_the_delay_in_the_body():
    with Gemini() as server:
        server.script(rate_limited(3))
        details = ask(server, "a fox").json()["error"]["details"]
        assert details == [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "3s"}]
