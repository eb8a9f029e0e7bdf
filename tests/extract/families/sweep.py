"""Opens a tiny checkpoint as `agiqa extract` does, and compares it with transformers' own processor and model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from agiqa.errors import AgiqaError
from agiqa.extract.data.items import Message
from agiqa.extract.models import open_backbone
from agiqa.extract.models.decoding.eligibility import Unfit, slot_shapes
from agiqa.extract.models.loading import quiet_transformers
from agiqa.store import TOKEN_ROLES
from tests.extract.families.text_specs import TEXT_FAMILIES
from tests.extract.families.writing import FAMILIES, write_text_family, write_vision_family

TOLERANCE = 1e-5
TALK = (
    Message(role="user", content="describe the image {braces} of 'a dog'?"),
    Message(role="assistant", content="a blurry dog"),
    Message(role="user", content="rate the quality"),
)


KINDS: dict[str, tuple[list[str], Callable[..., Path]]] = {
    "vision": (list(FAMILIES), write_vision_family),
    "text": (list(TEXT_FAMILIES), write_text_family),
}
"""kind -> (its families, the function that writes a tiny checkpoint of one)."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of one family."""

    family: str
    works: bool
    message: str = ""
    """Why it is refused."""

    @property
    def row(self) -> str:
        """Its row of the table."""
        message = self.message.replace("|", r"\|")
        return f"| {self.family} | {'works' if self.works else 'refused'} | {message} |"


class Wrong(AssertionError):
    """A family that opens but gives other numbers than transformers."""


def save_pictures(folder: Path) -> list[Path]:
    """Two images of noise, of different shapes."""
    noise = np.random.default_rng(0)
    paths = [folder / f"{index}.png" for index in range(2)]
    for path, shape in zip(paths, [(50, 64, 3), (30, 20, 3)], strict=True):
        Image.fromarray(noise.integers(0, 255, shape, dtype=np.uint8)).save(path)
    return paths


def try_family(kind: str, family: str, folder: Path) -> Outcome:
    """Write a tiny checkpoint into `folder`, open it and compare. Raises Wrong if numbers differ."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = save_pictures(folder.parent) if kind == "vision" else []
    KINDS[kind][1](folder, family)
    try:
        backbone = open_backbone(str(folder), dtype="float32", device="cpu")
        backbone.check_tensors()
        turns = (TALK, TALK[:1])
        items = [backbone.prepare(talk, picture) for talk, picture in zip(turns, pictures or (None, None), strict=True)]
        for talk in (TALK, TALK[:1], TALK[:2], TALK):
            _compare_outlines(backbone, talk, pictures)
        together = backbone.hidden_states(items)
        weight = backbone.lm_head()
    except AgiqaError as error:
        return Outcome(family=family, works=False, message=str(error).replace(str(folder), "FOLDER"))
    for talk, picture, item, states in zip(turns, pictures or (None, None), items, together, strict=True):
        ids, hidden, logits = own_numbers(backbone, folder, talk, picture)
        _same("token ids", torch.from_numpy(item.token_ids), ids)
        _same("hidden states", states, hidden)
        _same("logits", states.double() @ weight.double().T, logits)
        _same("hidden states alone", backbone.hidden_states([item])[0], states)
        if picture is not None:
            _check_image(backbone, talk, picture, item, states)
    return Outcome(family=family, works=True)


def why_not_in_slots(folder: Path) -> str:
    """Why the model in `folder`, which works, does not fit slots; nothing if it does."""
    backbone: Any = open_backbone(str(folder), dtype="float32", device="cpu")
    try:
        slot_shapes(backbone.answering_parts())
    except Unfit as reason:
        return str(reason)
    return ""


def own_numbers(
    backbone: Any, folder: Path, talk: Sequence[Message], picture: Path | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(token ids, input of the output embedding, logits) of one conversation, by transformers alone."""
    with quiet_transformers():
        model = backbone.model_class.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=backbone.attention
        ).eval()
    seen: list[torch.Tensor] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    inputs = own_inputs(backbone, talk, picture)
    inputs = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
    with torch.inference_mode():
        logits = model(**inputs, use_cache=False).logits[0]
    handle.remove()
    return inputs["input_ids"][0], seen[0][0], logits


def own_inputs(backbone: Any, talk: Sequence[Message], picture: Path | None) -> Any:
    """What transformers' own template and tokenizer or processor make of a conversation."""
    tokenizer = backbone.renderer.tokenizer
    if picture is None:
        turns: list[Any] = [{"role": turn.role, "content": turn.content} for turn in talk]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        return tokenizer(text, return_tensors="pt", add_special_tokens=False, return_token_type_ids=False)
    turns = [{"role": turn.role, "content": [{"type": "text", "text": turn.content}]} for turn in talk]
    turns[0]["content"].insert(0, {"type": "image"})
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    with Image.open(picture) as image:
        return backbone.processor(
            images=[image], text=[text], return_tensors="pt", add_special_tokens=not text.startswith("<s>")
        )


def _check_image(backbone: Any, talk: Sequence[Message], picture: Path, item: Any, states: torch.Tensor) -> None:
    """Raise Wrong if the image does not change the states, or no token has the role image."""
    negative = picture.with_name(f"negative-{picture.name}")
    with Image.open(picture) as image:
        image.point(lambda value: 255 - value).save(negative)
    other = backbone.prepare(talk, negative)
    if np.array_equal(other.token_ids, item.token_ids):
        change = (backbone.hidden_states([other])[0][-3:] - states[-3:]).norm() / states[-3:].norm()
        if change < 1e-5:
            message = f"the image is not seen (change {change:.1g})"
            raise Wrong(message)
    if not np.any(item.roles == TOKEN_ROLES["image"]):
        message = "no token has the role image"
        raise Wrong(message)


def _compare_outlines(backbone: Any, talk: Sequence[Message], pictures: Sequence[Path]) -> None:
    """Raise Wrong unless plans, which know the sizes of the images alone, find the tokens that the model reads."""
    for picture in pictures:
        whole = backbone.prepare(talk, picture)
        with Image.open(picture) as image:
            outline = backbone.outline(talk, picture, size=image.size)
        _same("outlined ids", torch.from_numpy(whole.token_ids), torch.from_numpy(outline.token_ids))
        _same("outlined roles", torch.from_numpy(whole.roles), torch.from_numpy(outline.roles))


def _same(what: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    if found.shape != expected.shape:
        message = f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
        raise Wrong(message)
    error = float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12))
    if not error <= TOLERANCE:
        message = f"{what}: relative error {error:.2g}"
        raise Wrong(message)
