"""`rating-words`: the expected MOS under the model's own probabilities of the five rating words. Nothing is trained.

The logits of the first token of each word, at the position that predicts the answer, become probabilities by a softmax;
each word stands for the middle of its fifth of the MOS scale (Wu et al. 2023, Q-Align, arXiv 2312.17090, section 3.3).
A conversation that ends with an answer is read at the token before it, any other at its last token.
"""

from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agiqa.errors import ConfigError, DataError
from agiqa.heads.closed.forms import FORMS, Form, Known
from agiqa.heads.closed.heads import HEADS, Array, ClosedHead, Inputs, Items, Tensors
from agiqa.heads.closed.pooled import Kept, item_rows
from agiqa.heads.data.features import FeatureSource, location_of
from agiqa.heads.data.layers import provenance_of
from agiqa.heads.data.scales import Scaled, scales_of
from agiqa.heads.settings.config import HeadConfig
from agiqa.heads.settings.labels import parse_labels
from agiqa.store import TOKEN_ROLES
from agiqa.store.format.labels import RATING_WORDS

WORDS = "rating-words"
RATING_TOKENS = "rating_tokens"
"""The entry of a store's provenance: the id of the first token of each rating word, by word."""
_LAST = "last"


@runtime_checkable
class _WithBasis(Protocol):
    @property
    def q(self) -> NDArray[np.float32]: ...


class WordHead(ClosedHead):
    """The output weights of the five words (5, channels) or, for stored logits, their token ids (5,); their values."""

    kind = WORDS

    @staticmethod
    def labels_of(tensors: Tensors) -> int:
        """One: an answer is about one aspect."""
        del tensors
        return 1

    def read(self, source: FeatureSource, items: Items, kept: Kept | None) -> Inputs:
        """The row at the position that predicts the answer."""
        return Inputs(values=answer_rows(source, items, kept), facts=self.facts)

    def scores(self, inputs: Inputs) -> Array:
        """The expected value (items, 1)."""
        words = self.get_buffer("words").cpu()
        logits = inputs.values @ words.double().numpy().T if words.ndim == 2 else inputs.values[:, words.numpy()]
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        found: Array = (weights @ self._numpy("values") / weights.sum(axis=1))[:, None]
        return found


HEADS[WORDS] = WordHead


@FORMS.register(WORDS)
class WordForm(Form):
    """The words of the model. `fit` reads no labels."""

    def read(self, source: FeatureSource, items: Items, kept: Kept | None) -> Inputs:
        """The rows, and what turns them into logits. Raises DataError for a source that lacks token ids or a scale."""
        tokens, scale = rating_tokens(self.config.rating_tokens, source), _scale(source, self.label)
        values = [scale[0] + (k + 0.5) * (scale[1] - scale[0]) / len(RATING_WORDS) for k in range(len(RATING_WORDS))]
        tensors = {"words": word_weights(source, tokens), "values": torch.tensor(values, dtype=torch.float64)}
        facts = {RATING_TOKENS: dict(zip(RATING_WORDS, tokens, strict=True)), "tensors": tensors}
        return Inputs(values=answer_rows(source, items, kept), facts=facts)

    def fit(self, inputs: Inputs, known: Known) -> ClosedHead:
        """The same head for any items."""
        del known
        return WordHead(inputs.facts["tensors"], {RATING_TOKENS: inputs.facts[RATING_TOKENS], "fits": []})


def expected_mos(source: FeatureSource, items: Items, label: str) -> Array:
    """The expected MOS (items,) by the tokens that `source` records. Raises as `WordForm.read`."""
    form = WordForm(config=HeadConfig(encoder=WORDS), pooling="auto", label=label)
    inputs = form.read(source, items, None)
    return WordHead(inputs.facts["tensors"], {}).scores(inputs)[:, 0]


def rating_tokens(given: str | None, source: FeatureSource) -> list[int]:
    """The token ids of the words, from bad to excellent: those `given`, or those that the store records.

    Raises ConfigError for a text that is not five different ids, and DataError for a store without a record.
    """
    if given is not None:
        parts = [part.strip() for part in given.split(",")]
        if (
            len(parts) != len(RATING_WORDS)
            or not all(part.isdecimal() for part in parts)
            or len(set(parts)) < len(parts)
        ):
            message = f"`rating_tokens` are five different token ids, of {', '.join(RATING_WORDS)}; given: {given!r}."
            raise ConfigError(message)
        return [int(part) for part in parts]
    recorded = provenance_of(source).get(RATING_TOKENS)
    if recorded is None:
        message = (
            f"{location_of(source)} does not record the tokens of the rating words. Give them by `rating_tokens`: the "
            f"id of the first token of {', '.join(RATING_WORDS)}, with commas between; or extract the store anew."
        )
        raise DataError(message)
    return [int(recorded[word]) for word in RATING_WORDS]


def word_weights(source: FeatureSource, tokens: list[int]) -> Tensor:
    """Rows of W_lm (5, D), of the basis of a sketch (5, r), or the ids (5,) for stored logits.

    Raises DataError for an id beyond the vocabulary, and what `source` raises without W_lm.
    """
    if source.encoding == "logits":
        rows, size = np.array(tokens), source.width
    else:
        basis = source.basis() if source.encoding == "sketch" else None
        if basis is not None and not isinstance(basis, _WithBasis):
            message = f"{location_of(source)}: its basis holds no directions to compute logits from."
            raise DataError(message)
        weights = source.lm_head() if basis is None else basis.q
        size = len(weights)
        rows = weights[[token for token in tokens if token < size]]
    beyond = [token for token in tokens if token >= size]
    if beyond:
        message = f"{location_of(source)} has {size} tokens in its vocabulary, and a rating word is token {beyond[0]}."
        raise DataError(message)
    return torch.from_numpy(np.ascontiguousarray(rows))


def answer_rows(source: FeatureSource, items: Items, kept: Kept | None) -> Array:
    """The row (items, channels) of the token that predicts the answer, float64."""
    pooled: list[str] = list(getattr(source, "pooled", ()))
    if pooled and _LAST not in pooled:
        message = (
            f"{location_of(source)} holds the pooled rows {', '.join(pooled)}, and the rating words are predicted at "
            f"the last token: extract with `--pool-tokens {','.join([*pooled, _LAST])}`, or give a store of tokens."
        )
        raise DataError(message)
    if pooled and _variant(source, "").startswith("full"):
        message = f"{location_of(source)}: the pooled row {_LAST!r} comes after the answer. Give a store of tokens."
        raise DataError(message)
    found = np.empty((len(items), source.width))
    for position, item in item_rows(source, items, kept):
        place = pooled.index(_LAST) if pooled else answer_place(item.roles.cpu().numpy())
        found[position] = item.rows[place].double().cpu().numpy()
    return found


def answer_place(roles: NDArray[np.uint8]) -> int:
    """The token before the last answer, if no question follows it; else the last token."""
    answers, questions = (np.flatnonzero(roles == TOKEN_ROLES[name]) for name in ("answer", "question"))
    if not len(answers) or (len(questions) and questions[-1] > answers[-1]):
        return len(roles) - 1
    others = np.flatnonzero(roles[: answers[-1]] != TOKEN_ROLES["answer"])
    return int(others[-1]) if len(others) else len(roles) - 1


def word_notes(source: FeatureSource) -> list[str]:
    """What a reader of the scores must know about how `source` answers."""
    notes: list[str] = []
    if source.encoding == "sketch":
        notes.append(
            f"rating-words reads logits that a sketch of rank {source.width} approximates; hidden states have them all"
        )
    variant, whole = _variant(source, "full"), str(provenance_of(source).get("view", {}).get("variant", ""))
    if not variant.startswith("full"):
        remedy = "leave `--variant` out" if whole.startswith("full") else "extract `--variant full`"
        notes.append(
            f"rating-words reads the last token of conversations of the variant {variant}, which end before the header "
            f"of the answer: {remedy} to read the token in front of the word"
        )
    return notes


def _variant(source: FeatureSource, default: str) -> str:
    """The variant of the conversations, if the source records it."""
    return str(provenance_of(source).get("conversation", {}).get("variant", default))


def _scale(source: FeatureSource, label: str) -> tuple[float, float]:
    names = parse_labels(label)
    if len(names) > 1:
        message = f"The answer of the model is about one aspect: `rating-words` predicts one label, not {label}."
        raise ConfigError(message)
    scale = scales_of(source, names)[0] if isinstance(source.items, Scaled) else None
    if scale is None:
        message = (
            f"{location_of(source)} does not record the scale of its {label} MOS, on which the words have their places."
            " `agiqa store labels STORE TABLE.csv --mos-range LOW HIGH` records it."
        )
        raise DataError(message)
    return scale
