"""Two wire formats of chat servers: OpenAI's chat completions, and Gemini's own generateContent.

vLLM, SGLang, llama.cpp, Ollama and Gemini's compatible endpoint speak the first. A format turns a `ChatRequest` into a
URL, headers and a JSON body, and the JSON of an answer into a `Reply`. It sends nothing: `client.py` does.
"""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, cast
from urllib.parse import urlsplit

from agiqa.errors import ConfigError, RemoteError, UnknownName
from agiqa.extract.teaching.chats import ChatRequest, Fault, FaultKind, Picture, Reply, Turn

Json = dict[str, Any]

_BUSY = (429, 503)
_AGAIN = (408, 409, 425)
_ABOUT_ONE_REQUEST = (400, 413, 415, 422)
_FILTERS = ("content_filter", "content_policy_violation", "invalid_prompt", "moderation_blocked")
"""Codes by which servers of OpenAI's format report that a filter refused the request."""
_SPENT = ("insufficient_quota", "billing_hard_limit_reached")
"""Codes of a 429 that no waiting mends."""
_DELAY = re.compile(r"(\d+(?:\.\d+)?)s")
_MOST = 10**12
"""Largest number of tokens that is believed."""
_RENAMED = re.compile(r"https://([\w-]+\.)*(openai\.com|azure\.com)/")
"""Servers that want `max_completion_tokens`; all others know the old name, `max_tokens`."""
_TILES = {"gpt-4o-mini": (2833, 5667)}
"""By model, the tokens of a picture and of each tile of it, where they are not (85, 170) as for gpt-4o."""


class Api(Protocol):
    """A wire format, for one server."""

    name: ClassVar[str]
    HOME: ClassVar[str]
    """Base URL of the provider that made the format."""
    KEY_VARIABLE: ClassVar[str]
    """Environment variable of the provider's key."""
    base_url: str
    """Without a slash at its end."""

    def url(self, model: str) -> str:
        """Where requests to `model` go."""
        ...

    def headers(self, key: str) -> dict[str, str]:
        """The headers that carry the key: the only place where it is ever written."""
        ...

    def body(self, model: str, request: ChatRequest) -> Json:
        """The JSON of `request`."""
        ...

    def read(self, answer: object) -> Reply:
        """The reply in the JSON of an answer. Raises RemoteError for JSON of another format."""
        ...

    def fault(self, status: int, answer: object) -> Fault:
        """What the answer with an HTTP `status` of 300 or more means; `answer` is its JSON, or None if it has none."""
        ...

    def error_status(self, answer: object) -> int | None:
        """The status of an error that arrived as a success (routers of several providers send such); None for none."""
        ...

    def picture_tokens(self, model: str, picture: Picture) -> int:
        """An estimate of the tokens that a picture takes."""
        ...


class OpenAIChat:
    """OpenAI's chat completions."""

    name: ClassVar[str] = "openai"
    HOME: ClassVar[str] = "https://api.openai.com/v1"
    KEY_VARIABLE: ClassVar[str] = "OPENAI_API_KEY"

    def __init__(self, base_url: str | None = None) -> None:
        """`base_url` is that of the server, with its version, such as http://localhost:8000/v1."""
        self.base_url = (base_url or self.HOME).rstrip("/")

    def url(self, model: str) -> str:  # noqa: ARG002  # the body names the model
        """Where all requests go."""
        return f"{self.base_url}/chat/completions"

    def headers(self, key: str) -> dict[str, str]:
        """As a bearer token."""
        return {"Authorization": f"Bearer {key}"}

    def body(self, model: str, request: ChatRequest) -> Json:
        """Pictures become data URLs."""
        limit = "max_completion_tokens" if _RENAMED.match(f"{self.base_url}/") else "max_tokens"
        settings: Json = {
            limit: request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": request.seed,
        }
        if request.schema is not None:
            schema = {"name": "answer", "strict": True, "schema": dict(request.schema)}
            settings["response_format"] = {"type": "json_schema", "json_schema": schema}
        return {
            "model": model,
            "messages": [{"role": turn.role, "content": _openai_content(turn)} for turn in request.turns],
            **_known(settings),
        }

    def read(self, answer: object) -> Reply:
        """A refusal has the finish reason content_filter, a `refusal`, or no message."""
        whole = _object(answer)
        usage, choices = _object(whole.get("usage")), whole.get("choices")
        if not isinstance(choices, list):
            message = "the answer has no `choices`: the server does not speak OpenAI's chat completions"
            raise RemoteError(message)
        choice = _object(choices[0]) if choices else {}
        said, reason = choice.get("message"), _text(choice.get("finish_reason"))
        refusal = _text(_object(said).get("refusal"))
        if refusal is None and reason is not None and reason.startswith("content_filter"):
            refusal = reason
        if refusal is None and not isinstance(said, dict):
            refusal = "no message in the answer"
        return Reply(
            text="" if refusal is not None else _openai_text(_object(said).get("content")),
            refusal=refusal,
            finish_reason=reason,
            cut=reason == "length",
            model=_text(whole.get("model")),
            input_tokens=_count(usage.get("prompt_tokens")),
            output_tokens=_count(usage.get("completion_tokens")),
            thoughts=_text(_object(said).get("reasoning_content")) or _text(_object(said).get("reasoning")),
        )

    def fault(self, status: int, answer: object) -> Fault:
        """By the status, and the code in the JSON of the error."""
        error = _error(answer)
        reason = _text(error.get("message")) or f"HTTP status {status}"
        code = _text(error.get("code")) or _text(error.get("type")) or ""
        if code in _FILTERS:
            return Fault(kind="refused", reason=f"{code}: {reason}")
        if code in _SPENT:
            return Fault(kind="fatal", reason=reason)
        return Fault(kind=_kind(status), reason=reason)

    def error_status(self, answer: object) -> int | None:
        """That of the JSON."""
        whole = _object(answer)
        code = _object(whole.get("error")).get("code")
        if not isinstance(whole.get("error"), dict) or isinstance(whole.get("choices"), list):
            return None
        return code if isinstance(code, int) and 400 <= code < 600 else 500

    def picture_tokens(self, model: str, picture: Picture) -> int:
        """85, and 170 per tile of 512 x 512 after fitting into 2048 x 2048 and a short side of 768: gpt-4o's rule."""
        width, height = picture.size
        scale = min(1.0, 2048 / max(width, height), 768 / min(width, height))
        tiles = -(-int(width * scale) // 512) * -(-int(height * scale) // 512)
        base, each = next((both for name, both in _TILES.items() if model.startswith(name)), (85, 170))
        return base + each * max(tiles, 1)


class GeminiContent:
    """Gemini's own generateContent."""

    name: ClassVar[str] = "gemini"
    HOME: ClassVar[str] = "https://generativelanguage.googleapis.com/v1beta"
    KEY_VARIABLE: ClassVar[str] = "GEMINI_API_KEY"
    CATEGORIES = ("HARASSMENT", "HATE_SPEECH", "SEXUALLY_EXPLICIT", "DANGEROUS_CONTENT")
    ANSWERED = (None, "STOP", "MAX_TOKENS", "FINISH_REASON_UNSPECIFIED")
    """Finish reasons of answers; those of refusals are all others, such as SAFETY."""

    def __init__(self, base_url: str | None = None) -> None:
        """`base_url` is that of the server, with its version."""
        self.base_url = (base_url or self.HOME).rstrip("/")

    def url(self, model: str) -> str:
        """Each model has a URL of its own."""
        return f"{self.base_url}/models/{model.removeprefix('models/')}:generateContent"

    def headers(self, key: str) -> dict[str, str]:
        """Not in the URL, which servers and proxies log."""
        return {"x-goog-api-key": key}

    def body(self, model: str, request: ChatRequest) -> Json:  # noqa: ARG002  # the URL names the model
        """With the filters that can be turned off turned off: an image data set holds all kinds of pictures."""
        settings: Json = {
            "maxOutputTokens": request.max_tokens,
            "temperature": request.temperature,
            "topP": request.top_p,
            "seed": request.seed,
        }
        if request.schema is not None:
            settings |= {"responseMimeType": "application/json", "responseSchema": _gemini_schema(request.schema)}
        return {
            "contents": [_gemini_content(turn) for turn in request.turns],
            "generationConfig": _known(settings),
            "safetySettings": [
                {"category": f"HARM_CATEGORY_{category}", "threshold": "BLOCK_NONE"} for category in self.CATEGORIES
            ],
        }

    def read(self, answer: object) -> Reply:
        """A refusal has a `blockReason`, no candidates, or a candidate with a finish reason such as SAFETY."""
        whole = _object(answer)
        if not ({"candidates", "promptFeedback", "usageMetadata"} & whole.keys()):
            message = "the answer has no `candidates`: the server does not speak Gemini's generateContent"
            raise RemoteError(message)
        usage, candidates = _object(whole.get("usageMetadata")), whole.get("candidates")
        candidate = _object(candidates[0]) if isinstance(candidates, list) and candidates else None
        reason = None if candidate is None else _text(candidate.get("finishReason"))
        refusal = _text(_object(whole.get("promptFeedback")).get("blockReason"))
        if refusal is None and candidate is None:
            refusal = "no candidates in the answer"
        if refusal is None and reason not in self.ANSWERED:
            refusal = reason
        parts = _object(_object(candidate).get("content")).get("parts")
        thoughts, said = _count(usage.get("thoughtsTokenCount")), _count(usage.get("candidatesTokenCount"))
        return Reply(
            text="" if refusal is not None else _gemini_text(parts),
            refusal=refusal,
            finish_reason=reason,
            cut=reason == "MAX_TOKENS",
            model=_text(whole.get("modelVersion")),
            input_tokens=_count(usage.get("promptTokenCount")),
            output_tokens=None if (thoughts, said) == (None, None) else (thoughts or 0) + (said or 0),
        )

    def fault(self, status: int, answer: object) -> Fault:
        """By the status; a wrong key has the status 400 here, and the details of a 429 name the wait."""
        error = _error(answer)
        reason = _text(error.get("message")) or f"HTTP status {status}"
        found = error.get("details")
        details = [_object(one) for one in found] if isinstance(found, list) else []
        if any(one.get("reason") == "API_KEY_INVALID" for one in details):
            return Fault(kind="fatal", reason=reason)
        delays = [match for one in details if (match := _DELAY.fullmatch(str(one.get("retryDelay", ""))))]
        return Fault(kind=_kind(status), reason=reason, wait=float(delays[0][1]) if delays else None)

    def error_status(self, answer: object) -> int | None:  # noqa: ARG002  # Gemini itself sends no such errors
        """None."""
        return None

    def picture_tokens(self, model: str, picture: Picture) -> int:  # noqa: ARG002  # all sizes are brought to one
        """1120, what Gemini 3 takes by default; Gemini 2 takes 258 per tile, 1032 for 512 x 512."""
        return 1120


APIS: dict[str, type[OpenAIChat] | type[GeminiContent]] = {"openai": OpenAIChat, "gemini": GeminiContent}


def api_of(name: str, base_url: str | None = None) -> Api:
    """The wire format called `name`, for the server at `base_url`; None for the provider's own.

    Raises UnknownName, and ConfigError for a URL that holds more than an address: files record it.
    """
    if name not in APIS:
        raise UnknownName.of(kind="api", name=name, known=APIS)
    try:
        parts = urlsplit(base_url or "")
    except ValueError as error:
        message = f"{base_url}: not the URL of a server ({error})."
        raise ConfigError(message) from error
    if parts.username or parts.password or parts.query or parts.fragment:
        message = (
            f"The base URL of {parts.hostname} holds a user, a password or parameters. Files would record them: give "
            "the address alone, and the key in an environment variable."
        )
        raise ConfigError(message)
    return APIS[name](base_url)


def _openai_content(turn: Turn) -> str | list[Json]:
    if turn.picture is None:
        return turn.text
    data = base64.b64encode(turn.picture.content).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:{turn.picture.mime};base64,{data}"}}
    return [image, {"type": "text", "text": turn.text}]


def _openai_text(content: object) -> str:
    """The text of a message, which some servers send in parts."""
    if isinstance(content, list):
        parts = [_object(part) for part in cast("list[object]", content)]
        return "".join(_text(part.get("text")) or "" for part in parts)
    return _text(content) or ""


def _gemini_content(turn: Turn) -> Json:
    parts: list[Json] = [{"text": turn.text}]
    if turn.picture is not None:
        data = base64.b64encode(turn.picture.content).decode()
        parts.insert(0, {"inlineData": {"mimeType": turn.picture.mime, "data": data}})
    return {"role": "model" if turn.role == "assistant" else "user", "parts": parts}


def _gemini_text(parts: object) -> str:
    found = [_object(part) for part in cast("list[object]", parts)] if isinstance(parts, list) else []
    return "".join(_text(part.get("text")) or "" for part in found if part.get("thought") is not True)


def _gemini_schema(schema: Mapping[str, Any]) -> Json:
    """The schema in the subset of OpenAPI that `responseSchema` takes: types in capitals, no `additionalProperties`."""
    converted: Json = {key: value for key, value in schema.items() if key in ("description", "required", "enum")}
    converted["type"] = str(schema["type"]).upper()
    if "properties" in schema:
        properties: Mapping[str, Mapping[str, Any]] = schema["properties"]
        converted["properties"] = {name: _gemini_schema(one) for name, one in properties.items()}
        converted["propertyOrdering"] = list(properties)
    return converted


def _kind(status: int) -> FaultKind:
    if status in _BUSY:
        return "busy"
    if status in _AGAIN or status >= 500:
        return "again"
    return "item" if status in _ABOUT_ONE_REQUEST else "fatal"


def _error(answer: object) -> Json:
    """The object `error` of an answer, in a list at Gemini's compatible endpoint; or `detail`, as FastAPI calls it."""
    if isinstance(answer, list) and answer:
        answer = cast("Sequence[object]", answer)[0]
    found = _object(answer)
    error = found.get("error", found.get("detail", found))
    if isinstance(error, list):
        error = json.dumps(error)
    return {"message": error} if isinstance(error, str) else _object(error)


def parse_json(content: bytes) -> object:
    """The JSON in the body of an answer; None if it is none."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _known(settings: Mapping[str, Any]) -> Json:
    return {name: value for name, value in settings.items() if value is not None}


def _object(value: object) -> Json:
    return cast("Json", value) if isinstance(value, dict) else {}


def _text(value: object) -> str | None:
    """The text, in which halves of characters (lone surrogates), which no file can hold, become question marks."""
    return value.encode(errors="replace").decode() if isinstance(value, str) and value else None


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST else None
