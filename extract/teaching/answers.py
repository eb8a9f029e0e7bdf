"""The teacher's answer: JSON with the item's id and one explanation per aspect, checked by a pydantic model."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError, create_model

KEYS = {
    "quality": "quality_explanation",
    "correspondence": "alignment_explanation",
    "authenticity": "authenticity_explanation",
}
"""By aspect, the key of its explanation in the answer (the paper's names)."""

ASPECTS = tuple(KEYS)

ID = "id"
"""The key under which the answer repeats the item's id: providers have returned answers out of order, and swapped."""

_Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


@dataclass(frozen=True, kw_only=True)
class Explained:
    """A valid answer."""

    id: str
    explanations: Mapping[str, str]
    """By aspect, without outer white space."""


@cache
def answer_model(aspects: tuple[str, ...]) -> type[BaseModel]:
    """The pydantic model of an answer about `aspects`; it ignores further keys."""
    fields: Any = dict.fromkeys((ID, *(KEYS[aspect] for aspect in aspects)), (_Text, ...))
    model: type[BaseModel] = create_model("Answer", __config__=ConfigDict(extra="ignore", strict=True), **fields)
    return model


def answer_schema(aspects: Sequence[str]) -> dict[str, Any]:
    """The JSON schema of an answer about `aspects`: only what every server understands."""
    names = [ID, *(KEYS[aspect] for aspect in aspects)]
    return {
        "type": "object",
        "properties": {name: {"type": "string"} for name in names},
        "required": names,
        "additionalProperties": False,
    }


def read_answer(text: str, aspects: Sequence[str]) -> Explained | str:
    """The explanations in the teacher's `text`, or the reason why there are none.

    The JSON begins at the first brace after any thoughts that the server has left in. What follows it does not matter.
    """
    said = text.rpartition("</think>")[2]
    start = said.find("{")
    if start < 0 or "}" not in said[start:]:
        return "no whole JSON object in the answer"
    try:
        value, _ = json.JSONDecoder().raw_decode(said, start)
        found = answer_model(tuple(aspects)).model_validate(value).model_dump()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        return f"{where + ': ' if where else ''}{first['msg']}"
    except (ValueError, RecursionError) as error:
        return f"Invalid JSON: {error}"
    explanations = {aspect: found[KEYS[aspect]] for aspect in aspects}
    return Explained(id=found[ID], explanations=explanations)
