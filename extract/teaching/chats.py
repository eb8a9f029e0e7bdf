"""What a chat server is asked and what it answers, in no server's wire format; `apis.py` has those."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from agiqa.extract.data.items import Role

FaultKind = Literal["busy", "again", "item", "unserved", "refused", "fatal"]
"""What an error of the server calls for.

busy: the same request later, the server serves nobody now; again: the same request once more; item: another one, the
server rejects this request; unserved: another one, this one failed again and again; refused: another model, a filter
refuses this request; fatal: the end, the server rejects all requests.
"""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image as it is sent."""

    content: bytes
    mime: str
    """Such as image/png."""
    size: tuple[int, int]
    """Width and height, in pixels."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message of a chat; its picture comes before its text."""

    role: Role
    text: str
    picture: Picture | None = None


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """What a server is asked."""

    turns: tuple[Turn, ...]
    schema: Mapping[str, Any] | None = None
    """JSON schema of the answer; None for free text."""
    max_tokens: int | None = None
    """Most tokens of the answer, thoughts included; None for the server's own limit."""
    temperature: float | None = None
    """None for the server's own, since some models accept no other."""
    seed: int | None = None
    top_p: float | None = None
    """None for the server's own."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a server answered."""

    text: str
    """Without thoughts, if the server takes them out; empty for a refusal."""
    refusal: str | None
    """The server's reason for a refusal; None for an answer."""
    finish_reason: str | None
    cut: bool
    """Whether the limit on tokens cut the answer off."""
    model: str | None
    """The model as the server names it; None if it does not."""
    input_tokens: int | None
    """Tokens of the request, the image included; None if unknown."""
    output_tokens: int | None
    """Tokens of the answer, thoughts included; None if unknown."""
    thoughts: str | None = None
    """Thoughts that the server sent beside the text; None for none."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """An answer of the server that is an error."""

    kind: FaultKind
    reason: str
    wait: float | None = None
    """Seconds that the body of the answer asks to wait; None if it names none."""
