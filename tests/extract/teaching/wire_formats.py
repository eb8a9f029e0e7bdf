"""The two wire formats of `tests/extract/teaching/providers.py`: OpenAI chat completions and Gemini generateContent."""

import json
import re
from base64 import b64decode
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tests.extract.teaching.providers import Provider, Reply, Request, tokens_of

_DATA_URL = re.compile(r"data:([\w/+.-]+);base64,(.*)", re.DOTALL)


def json_reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    return Reply(status=status, body=json.dumps(value).encode(), headers=headers or {})


def image_of(mime: str, data: str) -> bytes:
    """The bytes of an image in base64, whose beginning must fit the type."""
    content = b64decode(data, validate=True)
    begins = {"image/png": b"\x89PNG", "image/jpeg": b"\xff\xd8", "image/webp": b"RIFF", "image/gif": b"GIF8"}
    assert content.startswith(begins[mime]), f"{mime}: {content[:8]!r}"
    return content


def _words(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


class OpenAi(Provider):
    """`POST /v1/chat/completions`, as vLLM, SGLang, llama.cpp and Ollama speak it too."""

    API, ROOT = "openai", "/v1"
    REFUSALS = ("content_filter", "refusal", "empty_filter", "policy_error")
    FIELDS = _words(
        "model messages response_format temperature top_p seed max_tokens max_completion_tokens n stop stream",
        "user reasoning_effort presence_penalty frequency_penalty logprobs metadata store",
    )

    def key_of(self, request: Request) -> str | None:
        return request.headers.get("authorization", "").removeprefix("Bearer ") or None

    def parse(self, request: Request) -> Request:
        chats = (request.method, request.path) == ("POST", "/v1/chat/completions")
        return self.parsed(request, json.loads(request.raw)) if chats else request

    def parsed(self, request: Request, body: Any) -> Request:
        """`request` with the parts of the chat completion `body`."""
        turns, images = [], list[bytes]()
        for message in body["messages"]:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            turns.append((message["role"], "\n".join(part["text"] for part in parts if part["type"] == "text")))
            images += [_of_url(part["image_url"]["url"]) for part in parts if part["type"] == "image_url"]
        schema = body.get("response_format", {}).get("json_schema", {}).get("schema")
        return replace(request, body=body, model=body["model"], turns=tuple(turns), images=tuple(images), schema=schema)

    def route(self, request: Request) -> Reply:
        if (request.method, request.path) == ("GET", "/v1/models"):
            return json_reply({"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]})
        return self.error(404, "not_found", f"Unknown request URL: {request.method} {request.path}.")

    def fault(self, request: Request) -> str | None:
        unknown = sorted(request.body.keys() - self.FIELDS)
        if unknown:
            return f"Unrecognized request argument supplied: {unknown[0]}"
        form = request.body.get("response_format")
        if form is None or form["type"] != "json_schema":
            return None
        named = form["json_schema"]
        if not re.fullmatch(r"[\w-]{1,64}", named["name"]):
            return f"Invalid 'response_format.json_schema.name': {named['name']}"
        return _strict_fault(named["schema"]) if named.get("strict") else None

    def answer(self, request: Request, text: str, *, cut: bool = False) -> Reply:
        return self._completion(request, {"role": "assistant", "content": text}, "length" if cut else "stop", text)

    def refusal(self, request: Request, kind: str) -> Reply:
        no_text: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
        match kind:
            case "content_filter":  # as Gemini's compatible endpoint answers
                return self._completion(request, None, "content_filter: PROHIBITED_CONTENT", "")
            case "empty_filter":
                return self._completion(request, no_text, "content_filter", "")
            case "refusal":
                return self._completion(request, no_text | {"refusal": "I cannot help with that."}, "stop", "")
            case "policy_error":  # as Azure answers for a prompt that its filter stops
                return self.error(400, "content_filter", "The prompt triggered the content management policy.")
        raise LookupError(kind)

    def _completion(self, request: Request, message: dict[str, Any] | None, reason: str, text: str) -> Reply:
        given, made = tokens_of(request, text)
        return json_reply(
            {
                "id": f"chatcmpl-{request.number}",
                "object": "chat.completion",
                "created": 1_790_000_000,
                "model": f"{request.model}-2026-11-01",
                "choices": [{"index": 0, "message": message, "finish_reason": reason, "logprobs": None}],
                "usage": {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made},
            }
        )

    def error(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> Reply:
        kind = "server_error" if status >= 500 else "invalid_request_error"
        return json_reply({"error": {"message": message, "type": kind, "param": None, "code": code}}, status, headers)

    def refuse_key(self) -> Reply:
        return self.error(401, "invalid_api_key", "Incorrect API key provided: test****file.")


class Gemini(Provider):
    """`POST /v1beta/models/{model}:generateContent`; the key is the header x-goog-api-key."""

    API, ROOT = "gemini", "/v1beta"
    REFUSALS = ("prompt", "no_candidates", "SAFETY", "PROHIBITED_CONTENT", "RECITATION")
    FIELDS = frozenset(("contents", "systemInstruction", "generationConfig", "safetySettings", "model"))
    CONFIG = _words(
        "temperature topP topK candidateCount maxOutputTokens stopSequences responseMimeType responseSchema",
        "responseJsonSchema seed thinkingConfig mediaResolution presencePenalty frequencyPenalty",
    )
    SCHEMA = _words(
        "type format title description nullable enum items properties required propertyOrdering anyOf",
        "minItems maxItems minLength maxLength minimum maximum pattern",
    )
    STATUS: Mapping[int, str] = {
        400: "INVALID_ARGUMENT",
        403: "PERMISSION_DENIED",
        404: "NOT_FOUND",
        429: "RESOURCE_EXHAUSTED",
        500: "INTERNAL",
        503: "UNAVAILABLE",
    }

    def key_of(self, request: Request) -> str | None:
        return request.headers.get("x-goog-api-key")

    def parse(self, request: Request) -> Request:
        found = re.fullmatch(r"/v1beta/models/([^:/]+):generateContent", request.path)
        return request if found is None else self.parsed(request, found[1], json.loads(request.raw))

    def parsed(self, request: Request, model: str, body: Any) -> Request:
        """`request` with the parts of the GenerateContentRequest `body`."""
        contents = [{"role": "system", **body.get("systemInstruction", {"parts": []})}, *body["contents"]]
        roles = {"model": "assistant"}
        turns, images = [], list[bytes]()
        for content in contents:
            texts = [part["text"] for part in content["parts"] if "text" in part]
            if texts:
                turns.append((roles.get(content["role"], content["role"]), "\n".join(texts)))
            inline = [part["inlineData"] for part in content["parts"] if "inlineData" in part]
            images += [image_of(data["mimeType"], data["data"]) for data in inline]
        schema = body.get("generationConfig", {}).get("responseSchema")
        return replace(request, body=body, model=model, turns=tuple(turns), images=tuple(images), schema=schema)

    def route(self, request: Request) -> Reply:
        return self.error(404, "not_found", f"Not found: {request.method} {request.path}.")

    def fault(self, request: Request) -> str | None:
        config = request.body.get("generationConfig", {})
        unknown = sorted([*(request.body.keys() - self.FIELDS), *(config.keys() - self.CONFIG)])
        unknown += self._unknown_of(config.get("responseSchema", {}))
        if unknown:
            return f'Invalid JSON payload received. Unknown name "{unknown[0]}": Cannot find field.'
        if "responseSchema" in config and config.get("responseMimeType") != "application/json":
            return "responseSchema needs responseMimeType application/json."
        named = [setting["category"] for setting in request.body.get("safetySettings", [])]
        wrong = [name for name in named if not name.startswith("HARM_CATEGORY_")]
        return f"Invalid value at 'safety_settings': {wrong[0]}" if wrong else None

    def _unknown_of(self, schema: Mapping[str, Any]) -> list[str]:
        below = [*schema.get("properties", {}).values(), *([schema["items"]] if "items" in schema else [])]
        return [*sorted(schema.keys() - self.SCHEMA), *(name for one in below for name in self._unknown_of(one))]

    def answer(self, request: Request, text: str, *, cut: bool = False) -> Reply:
        return self._generated(request, [self._candidate("MAX_TOKENS" if cut else "STOP", text)], text)

    def refusal(self, request: Request, kind: str) -> Reply:
        match kind:
            case "prompt":
                return self._generated(request, None, "", promptFeedback={"blockReason": "PROHIBITED_CONTENT"})
            case "no_candidates":
                return self._generated(request, [], "")
            case _ if kind in self.REFUSALS:
                return self._generated(request, [self._candidate(kind, None)], "")
        raise LookupError(kind)

    def _candidate(self, reason: str, text: str | None) -> dict[str, Any]:
        content = {} if text is None else {"content": {"role": "model", "parts": [{"text": text}]}}
        return {**content, "finishReason": reason, "index": 0}

    def _generated(self, request: Request, candidates: list[Any] | None, text: str, **more: Any) -> Reply:
        given, made = tokens_of(request, text)
        usage = {"promptTokenCount": given, "totalTokenCount": given + made}
        body = {
            **({} if candidates is None else {"candidates": candidates}),
            "usageMetadata": usage | ({"candidatesTokenCount": made} if text else {}),
            "modelVersion": f"{request.model}-001",
            "responseId": f"response-{request.number}",
        }
        return json_reply({**body, **more})

    def error(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> Reply:
        details: list[dict[str, Any]] = []
        if status == 429 and headers:  # Gemini gives the delay in the body, not in a header
            delay = f"{headers['Retry-After']}s"
            details = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay}]
        error = {"code": status, "message": message, "status": self.STATUS.get(status, "UNKNOWN"), "details": details}
        return json_reply({"error": error}, status)

    def refuse_key(self) -> Reply:
        info = {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}
        message = "API key not valid. Please pass a valid API key."
        return json_reply(
            {"error": {"code": 400, "message": message, "status": "INVALID_ARGUMENT", "details": [info]}}, 400
        )


PROVIDERS = {"openai": OpenAi, "gemini": Gemini}


def _of_url(url: str) -> bytes:
    found = _DATA_URL.fullmatch(url)
    assert found, url[:40]
    return image_of(found[1], found[2])


def _strict_fault(schema: Mapping[str, Any]) -> str | None:
    """OpenAI's strict mode: every property is required, and no other is allowed."""
    if schema.get("additionalProperties") is not False:
        return "Invalid schema for response_format: 'additionalProperties' is required to be supplied and to be false."
    if sorted(schema.get("required", [])) != sorted(schema["properties"]):
        return "Invalid schema for response_format: 'required' is required to include every key in properties."
    return None
