"""Rating words: the word of a MOS, the word in a model's answer, and how well the two agree.

The fine-tuned model ends its conversation with one of five words, each for a fifth of the MOS range (Section III of the
M3-AGIQA paper). Table V of the paper scores these words against those of the true MOS.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import DataError
from agiqa.heads.data.prompt_groups import prompt_groups
from agiqa.heads.evaluation.significance import (
    FEWEST_PROMPTS,
    MetricBySeed,
    few_prompts,
    group_count,
    prompt_blocks,
    sampling_error,
)
from agiqa.store.format.labels import RATING_WORDS, rating_numbers

RATING_WORD_METRICS = ("accuracy", "rough_accuracy", "precision", "f1", "precision_weighted", "f1_weighted")

Array = NDArray[np.float64]

_UNKNOWN = len(RATING_WORDS)
_WORD = re.compile(rf"\b(?:{'|'.join(RATING_WORDS)})\b")
_DENIED = re.compile(
    rf"(?:\b(?:not|never|hardly|neither|nor)|n['\u2019]t)\s+(?:\w+\s+){{0,2}}(?:{'|'.join(RATING_WORDS)})\b"
)


def parse_rating_word(answer: str) -> str | None:
    """The rating word in a free answer, such as "The quality is **Good**."; None for an unclear answer.

    Case and punctuation do not matter. An answer is unclear with no rating word, with two different ones, or with a
    negated one ("not good").
    """
    text = unicodedata.normalize("NFKC", answer).casefold().replace("_", " ")
    found = set(_WORD.findall(text))
    return found.pop() if len(found) == 1 and not _DENIED.search(text) else None


def score_words(
    answers: Sequence[str],
    mos: Sequence[float] | Array,
    prompts: Sequence[str] | None = None,
    *,
    mos_range: tuple[float, float] = (0.0, 5.0),
    confidence: float = 0.95,
) -> dict[str, Any]:
    """How well free answers name the words of the true MOS, ready for JSON.

    The MOS range has five equal bins, one for each word. On 0 to 5: [0, 1) bad, [1, 2) poor, [2, 3) fair, [3, 4) good,
    [4, 5] excellent.

    `{"n", "unknown", "accuracy", "rough_accuracy", "precision", "f1", "precision_weighted", "f1_weighted",
    "ci": {metric: [low, high]}, "confusion": {true word: {answered word or "unknown": items}}, "confidence"}`.

    An unclear answer is wrong, and counted in `unknown`. Precision and F1 are means over the words that occur among
    truths or answers: plain ("macro"), or weighted by the frequency of the true word. A word that is never answered has
    precision 0. The paper defines neither the mean nor rough accuracy; we count the true word and its neighbours.

    Intervals leave out whole prompts, or single items without `prompts`, and are null for fewer than 10 of them. Below
    50, `"caution"` gives their number.
    Raises DataError without items, for unequal numbers of them, and for MOS outside `mos_range`; ConfigError for an
    empty range.
    """
    values = np.asarray(mos, dtype=np.float64)
    if not len(answers) == len(values) == (len(values) if prompts is None else len(prompts)):
        given = "none" if prompts is None else len(prompts)
        message = f"There are {len(answers)} answers, {len(values)} MOS and {given} prompts."
        raise DataError(message)
    if not len(answers):
        message = "There are no answers to score."
        raise DataError(message)
    truths = rating_numbers(values, mos_range)
    words = [parse_rating_word(answer) for answer in answers]
    answered = np.array([_UNKNOWN if word is None else RATING_WORDS.index(word) for word in words])
    groups = np.arange(len(answers)) if prompts is None else prompt_groups(prompts)
    blocks, caution = prompt_blocks(groups), few_prompts(groups, rmse=False)
    by_block = np.zeros((group_count(blocks), len(RATING_WORDS), len(RATING_WORDS) + 1))
    np.add.at(by_block, (blocks, truths, answered), 1.0)
    table = by_block.sum(axis=0)
    metrics = _score(table[None])[0]
    columns = (*RATING_WORDS, "unknown")
    return {
        "n": len(answers),
        "unknown": int((answered == _UNKNOWN).sum()),
        **dict(zip(RATING_WORD_METRICS, metrics.tolist(), strict=True)),
        "ci": _intervals(metrics, table - by_block, group_count(groups), confidence),
        "confusion": {
            word: dict(zip(columns, row, strict=True))
            for word, row in zip(RATING_WORDS, table.astype(int).tolist(), strict=True)
        },
        "confidence": confidence,
        **({} if caution is None else {"caution": caution}),
    }


def _intervals(metrics: Array, without: Array, prompts: int, confidence: float) -> dict[str, list[float] | None]:
    """The interval of each metric (metric,), from the tables without each block; None for too few prompts."""
    if prompts < FEWEST_PROMPTS["srcc"]:
        return dict.fromkeys(RATING_WORD_METRICS)
    left_out = _score(without)
    return {
        name: sampling_error(MetricBySeed(values=metrics[k : k + 1], left_out=left_out[None, :, k])).share_interval(
            float(metrics[k]), confidence
        )
        for k, name in enumerate(RATING_WORD_METRICS)
    }


def _score(tables: Array) -> Array:
    """The metrics (tables, metric), in their order, from counts (tables, true word, answered word)."""
    readable = tables[:, :, :_UNKNOWN]
    items, truths, answered = tables.sum((1, 2)), tables.sum(2), readable.sum(1)
    hits = np.einsum("tkk->tk", readable)
    places = np.arange(len(RATING_WORDS))
    near = np.abs(places[:, None] - places) <= 1
    precision = hits / np.maximum(answered, 1.0)
    f1 = 2 * hits / np.maximum(truths + answered, 1.0)
    present = truths + answered > 0
    return np.stack(
        [
            hits.sum(1) / items,
            (readable * near).sum((1, 2)) / items,
            *((part * present).sum(1) / present.sum(1) for part in (precision, f1)),
            *((part * truths).sum(1) / items for part in (precision, f1)),
        ],
        axis=1,
    )
