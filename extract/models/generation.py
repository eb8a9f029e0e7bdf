"""Answers of a transformers model: batches padded on the left, greedy or sampled, cut at the end of the turn."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from agiqa.errors import DataError
from agiqa.extract.models.batches import PER_TOKEN, alike
from agiqa.extract.models.contract import Answer, GenerationSettings, Prepared
from agiqa.extract.models.decoding.choosing import Policy, choose
from agiqa.extract.models.loading import quiet_transformers
from agiqa.extract.models.rendering import Renderer, begins_in_thought, split_thoughts

TURN_ENDS = ("<|eot_id|>",)
"""Tokens that end a turn if the tokenizer has them: the published settings of Llama 3 leave this one out."""

_PER_TOKEN = PER_TOKEN | {"input_ids", "attention_mask", "inputs_embeds"}

Inputs = dict[str, torch.Tensor]


def generate(
    model: Any,
    renderer: Renderer,
    batch: Sequence[Prepared],
    settings: GenerationSettings,
    seeds: Sequence[int] | None = None,
    *,
    collate: Callable[[Sequence[Prepared]], Inputs],
    positions: int | None,
) -> list[str]:
    """See `Backbone.generate`. Items that are not `alike` run in separate batches.

    `seeds` are as in `Backbone.generate`; `collate` makes model inputs padded on the right; `positions` is the model's
    longest sequence.
    """
    answers: dict[int, str] = {}
    seeds = seeds or [settings.seed] * len(batch)
    stops = stop_tokens(model, renderer)
    for group in alike(batch):
        items = [batch[position] for position in group]
        limits = [new_tokens(len(item.token_ids), settings, positions) for item in items]
        inputs = left_padded(collate(items), [len(item.token_ids) for item in items])
        chosen = [seeds[position] for position in group]
        rows = generated_ids(model, inputs, settings, seeds=chosen, stops=stops, limit=max(limits))
        for position, row, limit in zip(group, rows, limits, strict=True):
            begun = begins_in_thought(renderer.tokenizer, batch[position].token_ids.tolist())
            answers[position] = read_answer(renderer.tokenizer, row[:limit], stops, begun=begun)
    return [answers[position] for position in range(len(batch))]


def new_tokens(length: int, settings: GenerationSettings, positions: int | None) -> int:
    """The most tokens of an answer to `length` tokens. Raises DataError if the model has no position left."""
    left = settings.max_new_tokens if positions is None else positions - length
    if left < 1:
        message = f"{length} tokens, and the model has {positions} positions: none is left for an answer."
        raise DataError(message)
    return min(left, settings.max_new_tokens)


def stop_tokens(model: Any, renderer: Renderer) -> list[int]:
    """The ids that end an answer according to checkpoint, tokenizer or chat template."""
    tokenizer = renderer.tokenizer
    stated = getattr(model.generation_config, "eos_token_id", None)
    found = {*(stated if isinstance(stated, list) else [stated]), tokenizer.eos_token_id, renderer.turn_end}
    vocabulary = tokenizer.get_vocab()
    found |= {vocabulary[word] for word in TURN_ENDS if word in vocabulary}
    return sorted(token for token in found if token is not None)


def left_padded(inputs: Inputs, lengths: Sequence[int]) -> Inputs:
    """`inputs`, with the padding of all values per token moved from the right to the left."""
    width = inputs["attention_mask"].shape[1]

    def moved(value: torch.Tensor) -> torch.Tensor:
        rows = [row.roll(width - length, dims=0) for row, length in zip(value, lengths, strict=True)]
        return torch.stack(rows)

    return {key: moved(value) if key in _PER_TOKEN else value for key, value in inputs.items()}


def generated_ids(
    model: Any,
    inputs: Inputs,
    settings: GenerationSettings,
    *,
    seeds: Sequence[int],
    stops: Sequence[int],
    limit: int,
) -> list[list[int]]:
    """Up to `limit` new ids for each row of `inputs` (input_ids or inputs_embeds), which are padded on the left.

    `seeds` are those of each row's draws, which leave torch's random state unchanged. Ids after one of `stops` are
    padding.
    """
    width = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    processors = LogitsProcessorList()
    if settings.repetition_penalty != 1.0:
        # for the answer alone, as published: with the prompt, padding would change the answers of a batch
        processors.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty, prompt_ignore_length=width))
    if settings.sample:
        processors.append(_Draws(settings, torch.tensor(list(seeds), device=inputs["attention_mask"].device), width))
    config = GenerationConfig(
        max_new_tokens=limit, do_sample=False, eos_token_id=list(stops), pad_token_id=stops[0] if stops else 0
    )
    with _own_settings(model, config), torch.inference_mode():
        tokens: torch.Tensor = model.generate(**inputs, generation_config=config, logits_processor=processors)
    rows: list[list[int]] = tokens[:, width:].tolist()
    return rows


def read_answer(tokenizer: Any, ids: Sequence[int], stops: Sequence[int], *, begun: bool = False) -> Answer:
    """The text of `ids` up to the first of `stops`, without thoughts; `begun` as in `split_thoughts`."""
    length = next((place for place, token in enumerate(ids) if token in stops), len(ids))
    text, generated = split_thoughts(tokenizer, ids[:length], begun=begun)
    return Answer(text, tokens=length, complete=length < len(ids), generated=generated)


class _Draws(LogitsProcessor):
    """Draws a token for each row as answers in slots do, and lets `generate` choose no other."""

    def __init__(self, settings: GenerationSettings, seeds: torch.Tensor, width: int) -> None:
        """`seeds` (n,) are those of the rows, and `width` the number of ids before the answers."""
        self._policy = replace(Policy.of(settings), repetition_penalty=1.0)  # another processor has penalised
        self._seeds, self._width = seeds, width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (n, V): 0 for the token that is drawn by `scores` (n, V), minus infinity for the others."""
        numbers = torch.full_like(self._seeds, input_ids.shape[1] - self._width)
        chosen = choose(scores.float(), self._policy, said=None, seeds=self._seeds, numbers=numbers)
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen[:, None], 0.0)


@contextmanager
def _own_settings(model: Any, config: GenerationConfig) -> Generator[None]:
    """Use `config` alone: the checkpoint's settings would fill in what it leaves open. Silences transformers."""
    stated = model.generation_config
    model.generation_config = config
    try:
        with quiet_transformers():
            yield
    finally:
        model.generation_config = stated
