"""The laws of encoders and poolings, for the parts of agiqa and for your own.

    from agiqa.heads import check_encoder

    def test_my_encoder():
        check_encoder("my-encoder")

Inputs are items of several lengths, one of them a single token. All but mixed precision is computed in float64.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from agiqa.errors import BrokenLaw, ConfigError
from agiqa.heads.model.encoders.base import ENCODERS, Encoder, completed
from agiqa.heads.model.pooling import POOLINGS, Pooling
from agiqa.heads.settings.config import HeadConfig

LENGTHS = (9, 6, 4, 1)
"""Tokens of the items."""
WIDTH = 16
SIZES: dict[str, Any] = {"width": WIDTH, "num_heads": 2, "blocks": 3, "layers": 2, "state_size": 4}
"""Settings of the encoders under test."""
_LEAST = 1e-10
"""A gradient below this is rounding in float64, not learning."""
_IN_PADDING = (1e3, float("nan"), float("inf"))

Tokens = Float[Tensor, "batch token width"]
Mask = Bool[Tensor, "batch token"]


def ragged_tokens() -> Tokens:
    """Random tokens of the items, and of their padding, the same in every call."""
    torch.manual_seed(1)
    return torch.randn(len(LENGTHS), max(LENGTHS), WIDTH, dtype=torch.float64)


def ragged_mask() -> Mask:
    """True on the tokens of the items."""
    return torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]


@dataclass(frozen=True, kw_only=True)
class EncoderCase:
    """An encoder under test."""

    name: str
    bidirectional: bool
    encoder: Encoder
    """In float64, in evaluation mode."""

    @classmethod
    def make(cls, name: str, *, bidirectional: bool, **settings: Any) -> "EncoderCase":
        """The encoder called `name`, of the sizes of the laws and other `settings`. Raises what building it raises."""
        torch.manual_seed(0)
        config = completed(HeadConfig(encoder=name, bidirectional=bidirectional, **{**SIZES, **settings}))
        encoder: Encoder = ENCODERS.get(name)(config).double().eval()
        return cls(name=name, bidirectional=bidirectional, encoder=encoder)

    def __str__(self) -> str:
        """For messages."""
        return f"The encoder {self.name!r} ({'bidirectional' if self.bidirectional else 'causal'})"


EncoderLaw = Callable[[EncoderCase], str | None]
"""Returns what is wrong, and what to do; None where the law holds."""


def has_the_stated_width(case: EncoderCase) -> str | None:
    """The outputs have `out_width` channels and a row for every token."""
    mask = ragged_mask()
    found, wanted = tuple(case.encoder(ragged_tokens(), mask).shape), (*mask.shape, case.encoder.out_width)
    return None if found == wanted else f"its outputs have the shape {found}, expected {wanted} by its out_width"


def gives_every_parameter_a_gradient(case: EncoderCase) -> str | None:
    """Every parameter gets a finite gradient that is not zero."""
    outputs = case.encoder.train()(ragged_tokens().requires_grad_(), ragged_mask())
    (outputs * torch.randn_like(outputs)).sum().backward()
    case.encoder.eval()
    for name, parameter in case.encoder.named_parameters():
        gradient = parameter.grad
        if gradient is None or not gradient.abs().max() > _LEAST:
            return f"its parameter {name} gets no gradient. Use it in `forward`, or remove it"
        if not gradient.isfinite().all():
            return f"its parameter {name} gets a gradient that is not finite"
    return None


def uses_no_layer_twice(case: EncoderCase) -> str | None:
    """No layer object is called more than once in a pass."""
    calls: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., None]:
        return lambda *_: calls.update([name])

    leaves = [(name, layer) for name, layer in case.encoder.named_modules() if name and not [*layer.children()]]
    hooks = [layer.register_forward_hook(counted(name)) for name, layer in leaves]
    case.encoder(ragged_tokens(), ragged_mask())
    for hook in hooks:
        hook.remove()
    twice = [name for name, count in calls.items() if count > 1]
    return f"its layer {twice[0]} is called {calls[twice[0]]} times. Make as many layers" if twice else None


def reads_the_tokens_that_it_should(case: EncoderCase) -> str | None:
    """The last token depends on the first where `mixes_tokens`, the first on the last where it is bidirectional."""
    last = LENGTHS[0] - 1
    if (_felt(case.encoder, by=last, of=0) > _LEAST) != case.encoder.mixes_tokens:
        does = "does not depend" if case.encoder.mixes_tokens else "depends"
        return f"the last token {does} on the first, and its mixes_tokens is {case.encoder.mixes_tokens}"
    if (_felt(case.encoder, by=0, of=last) > _LEAST) == case.bidirectional:
        return None
    if case.bidirectional:
        return (
            "the first token does not depend on the last, with `bidirectional` set. Register a causal encoder as "
            "EitherWay(YourEncoder), or raise ConfigError for config.bidirectional"
        )
    return (
        "the first token depends on the last, without `bidirectional`. Read earlier tokens only, or raise ConfigError "
        "unless config.bidirectional is set"
    )


def looks_ahead_only_if_bidirectional(case: EncoderCase) -> str | None:
    """Later tokens change the outputs of earlier ones exactly where it is bidirectional."""
    tokens, mask, cut = ragged_tokens(), ragged_mask(), 5
    changed = tokens.clone()
    changed[:, cut:] *= -2.0
    before, after = case.encoder(tokens, mask), case.encoder(changed, mask)
    if torch.allclose(before[0, cut:], after[0, cut:]):
        return "its outputs do not depend on its inputs"
    same = torch.allclose(before[:, :cut], after[:, :cut], rtol=1e-12, atol=1e-12)
    return (
        f"later tokens {'do not change' if same else 'change'} earlier outputs" if same == case.bidirectional else None
    )


def reads_each_item_alone(case: EncoderCase) -> str | None:
    """The outputs of an item do not depend on the other items of its batch."""
    tokens, mask = ragged_tokens(), ragged_mask()
    together = case.encoder(tokens, mask)
    for row, length in enumerate(LENGTHS):
        alone = case.encoder(tokens[row : row + 1, :length], mask[row : row + 1, :length])
        if not torch.allclose(together[row, :length], alone[0], rtol=1e-9, atol=1e-9):
            return (
                f"an item of {length} tokens has other outputs in a batch than alone. Compute per item, with the mask"
            )
    return None


def ignores_padding(case: EncoderCase) -> str | None:
    """Values in padding change no output and no gradient, and outputs at padding are zero."""
    tokens, mask = ragged_tokens(), ragged_mask()
    parameters = list(case.encoder.parameters())
    clean = case.encoder(tokens.masked_fill(~mask[..., None], 0.0), mask)
    wanted = _gradients(clean.square().sum(), parameters)
    for value in _IN_PADDING:
        filled = tokens.masked_fill(~mask[..., None], value).requires_grad_()
        dirty = case.encoder(filled, mask)
        if not torch.allclose(clean, dirty, rtol=1e-12, atol=1e-12):
            return f"{value:g} in the padding changes its outputs. Begin with tokens.masked_fill(~mask[..., None], 0.0)"
        if (dirty[~mask] != 0).any():
            return "its outputs at padding are not zero. End with outputs.masked_fill(~mask[..., None], 0.0)"
        gradients = _gradients(dirty.square().sum(), [filled, *parameters])
        exact = all(torch.allclose(*pair, rtol=1e-9, atol=1e-12) for pair in zip(gradients[1:], wanted, strict=True))
        if (gradients[0][~mask] != 0).any() or not exact:
            return f"{value:g} in the padding changes its gradients. Mask the tokens before the first operation"
    return None


def stays_near_in_mixed_precision(case: EncoderCase) -> str | None:
    """Under autocast to bfloat16 outputs stay near those in float32, and gradients are finite."""
    encoder, mask = case.encoder.float(), ragged_mask()
    tokens = ragged_tokens().bfloat16().requires_grad_()
    expected = encoder(tokens.float(), mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = encoder(tokens, mask)
    if not torch.allclose(outputs.float(), expected, rtol=0.1, atol=0.1):
        return "its outputs under autocast to bfloat16 are far from those in float32"
    (gradient,) = _gradients(outputs.float().square().sum(), [tokens])
    encoder.double()
    return None if gradient.isfinite().all() else "its gradients under autocast to bfloat16 are not finite"


ENCODER_LAWS: tuple[EncoderLaw, ...] = (
    has_the_stated_width,
    gives_every_parameter_a_gradient,
    uses_no_layer_twice,
    reads_the_tokens_that_it_should,
    looks_ahead_only_if_bidirectional,
    reads_each_item_alone,
    ignores_padding,
    stays_near_in_mixed_precision,
)


def check_encoder(name: str, **settings: Any) -> None:
    """Check the encoder registered as `name` by ENCODER_LAWS, causal and bidirectional.

    `settings` are those of HeadConfig, such as `own_settings`, besides SIZES. A direction that the encoder refuses by
    ConfigError is left out. Raises BrokenLaw, naming every law that does not hold, UnknownName for the encoder, and
    ConfigError if it refuses both directions.
    """
    cases, refusals = list[EncoderCase](), list[ConfigError]()
    ENCODERS.get(name)
    for bidirectional in (False, True):
        try:
            cases.append(EncoderCase.make(name, bidirectional=bidirectional, **settings))
        except ConfigError as error:
            refusals.append(error)
    if not cases:
        raise refusals[0]
    _raise_broken([f"{case}: {wrong}." for case in cases for law in ENCODER_LAWS if (wrong := law(case)) is not None])


def check_pooling(name: str) -> None:
    """Check the pooling registered as `name`: one vector per item, blind to padding and to the batch.

    Raises BrokenLaw, naming every law that does not hold, and UnknownName for the pooling.
    """
    torch.manual_seed(0)
    pooling = POOLINGS.get(name)(HeadConfig(), WIDTH).double()
    _randomise(pooling)
    wrong = (_pools_each_item_to_one_vector(pooling), _pooling_ignores_padding(pooling))
    _raise_broken([f"The pooling {name!r}: {what}." for what in wrong if what is not None])


def _pools_each_item_to_one_vector(pooling: Pooling) -> str | None:
    tokens, mask = ragged_tokens(), ragged_mask()
    together = pooling(tokens, mask)
    if tuple(together.shape) != (len(LENGTHS), WIDTH):
        return f"its outputs have the shape {tuple(together.shape)}, expected {(len(LENGTHS), WIDTH)}"
    for row, length in enumerate(LENGTHS):
        alone = pooling(tokens[row : row + 1, :length], mask[row : row + 1, :length])
        if not torch.allclose(alone[0], together[row]):
            return f"an item of {length} tokens is pooled otherwise in a batch than alone. Use the mask"
    return None


def _pooling_ignores_padding(pooling: Pooling) -> str | None:
    mask = ragged_mask()
    found: list[Sequence[Tensor]] = []
    for value in (0.0, *_IN_PADDING, -float("inf")):
        given = ragged_tokens().masked_fill(~mask[..., None], value).requires_grad_()
        pooled = pooling(given, mask)
        found.append([pooled, *_gradients(pooled.square().sum(), [given, *pooling.parameters()])])
        if not all(torch.allclose(*pair) for pair in zip(found[0], found[-1], strict=True)):
            return f"{value:g} in the padding changes its outputs or gradients. Mask the tokens first"
    return None


@torch.no_grad()
def _randomise(part: nn.Module) -> None:
    """Move parameters away from special values such as zero."""
    for parameter in part.parameters():
        parameter.add_(torch.randn_like(parameter))


def _felt(encoder: Encoder, *, by: int, of: int) -> float:
    """The largest gradient of the output of token `by` of the first item with respect to its token `of`."""
    tokens = ragged_tokens().requires_grad_()
    output = encoder(tokens, ragged_mask())[0, by]
    torch.manual_seed(2)
    (gradient,) = _gradients((output * torch.randn(len(output))).sum(), [tokens])
    return gradient[0, of].abs().max().item()


def _gradients(value: Float[Tensor, ""], of: Sequence[Tensor]) -> Sequence[Tensor]:
    """The gradients of `value`; zeros for what it does not depend on."""
    if not of or not value.requires_grad:
        return [torch.zeros_like(one) for one in of]
    return torch.autograd.grad(value, of, allow_unused=True, materialize_grads=True)


def _raise_broken(lines: Sequence[str]) -> None:
    if lines:
        raise BrokenLaw("\n".join(lines))
