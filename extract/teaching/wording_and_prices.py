"""The teacher's data: the wording of its request (`wording.yaml`) and prices of models (`prices.yaml`).

Users may give files of their own; pydantic models check them all.
"""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from agiqa.errors import ConfigError
from agiqa.extract.teaching.answers import ASPECTS
from agiqa.store.disk.files import read_text

Table = TypeVar("Table", bound=BaseModel)

PLACEHOLDER = re.compile(r"\{(prompt|low|high|scores|tasks|id|example)\}")
_NEEDED = {
    "known": {"prompt", "low", "high", "scores", "tasks", "id", "example"},
    "blind": {"prompt", "tasks", "id", "example"},
}

_PRICE = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class Wording(BaseModel):
    """The words of the teacher's request."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    known: str
    blind: str
    tasks: Mapping[str, str]
    """By aspect."""
    example: Mapping[str, str]
    """By aspect."""

    @field_validator("known", "blind")
    @classmethod
    def _check_placeholders(cls, text: str, info: Any) -> str:
        found, needed = set(PLACEHOLDER.findall(text)), _NEEDED[info.field_name]
        if found != needed:
            wrong = [f"lacks {{{name}}}" for name in sorted(needed - found)]
            wrong += [f"must not have {{{name}}}" for name in sorted(found - needed)]
            message = ", ".join(wrong)
            raise ValueError(message)
        return text

    @field_validator("tasks", "example")
    @classmethod
    def _check_aspects(cls, texts: Mapping[str, str]) -> Mapping[str, str]:
        if set(texts) != set(ASPECTS):
            message = f"expected the aspects {', '.join(ASPECTS)}, found {', '.join(texts) or 'none'}"
            raise ValueError(message)
        return texts


class Price(BaseModel):
    """USD per million tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: _PRICE
    output: _PRICE

    def cost(self, input_tokens: float, output_tokens: float) -> float:
        """USD of one request."""
        return (self.input * input_tokens + self.output * output_tokens) / 1e6

    def times(self, share: float) -> "Price":
        """The price at a discount."""
        return Price(input=share * self.input, output=share * self.output)


class _Server(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str
    batch: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    models: dict[str, Price]


class PriceTable(BaseModel):
    """Prices by server and model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    servers: tuple[_Server, ...]

    def price(self, base_url: str, model: str, *, batch: bool = False) -> Price | None:
        """The price of `model` on the server at `base_url`, the longest `url` that begins it; None if unknown."""
        name = model.removeprefix("models/")
        found = [one for one in self.servers if f"{base_url}/".startswith(one.url) and name in one.models]
        if not found:
            return None
        server = max(found, key=lambda one: len(one.url))
        return server.models[name].times(server.batch if batch else 1.0)


def price_advice(base_url: str, model: str) -> str:
    """How the user gives the price of a model that the table lacks."""
    entry = f'{{url: "{base_url}/", models: {{"{model}": {{input: 1.25, output: 10.0}}}}}}'
    return f"Write its price, in USD per million tokens, into a file for --prices: `servers: [{entry}]`"


@cache
def shipped_wording() -> Wording:
    """The wording in `wording.yaml`."""
    return read_yaml(Path(__file__).with_name("wording.yaml"), Wording)


@cache
def shipped_prices() -> PriceTable:
    """The prices in `prices.yaml`."""
    return read_yaml(Path(__file__).with_name("prices.yaml"), PriceTable)


def read_yaml(path: Path, kind: type[Table]) -> Table:
    """The data in a YAML file like `wording.yaml` or `prices.yaml`. Raises ConfigError for other contents."""
    try:
        return kind.model_validate(yaml.safe_load(read_text(path)))
    except yaml.YAMLError as error:
        message = f"{path}: not YAML ({error})."
        raise ConfigError(message) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        message = f"{path}: {'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}."
        raise ConfigError(message) from error
