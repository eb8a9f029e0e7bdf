"""What every sequence encoder must do, as a class of tests: inherit it, and say in the fixture `variant` which encoder.

    class TestMyEncoder(EncoderContract):
        @pytest.fixture(params=[False, True], ids=["causal", "bidirectional"])
        def variant(self, request):
            return "mine", request.param

The name is one of ENCODERS. All but mixed precision runs in float64, and nothing is dropped out.
"""

from collections import Counter

import pytest
import torch

from agiqa.heads.model.encoders import ENCODERS
from agiqa.heads.settings.config import HeadConfig

LENGTHS = (9, 6, 4, 1)
WIDTH = 16
SIZES = {"width": WIDTH, "num_heads": 2, "blocks": 3, "layers": 2, "state_size": 4}
LEAST = 1e-10
"""A gradient below this is rounding in float64, not learning."""


def ragged_tokens():
    torch.manual_seed(1)
    return torch.randn(len(LENGTHS), max(LENGTHS), WIDTH, dtype=torch.float64)


def ragged_mask():
    return torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]


class EncoderContract:
    """The laws, over items of several lengths, one of them a single token."""

    @pytest.fixture
    def variant(self) -> tuple[str, bool]:
        """The registered name, and whether both directions are asked for."""
        raise NotImplementedError

    @pytest.fixture
    def bidirectional(self, variant):
        return variant[1]

    @pytest.fixture
    def encoder(self, variant):
        name, bidirectional = variant
        torch.manual_seed(0)
        config = HeadConfig(encoder=name, bidirectional=bidirectional, **SIZES)
        return ENCODERS.get(name)(config).double().eval()

    @pytest.fixture
    def tokens(self):
        return ragged_tokens()

    @pytest.fixture
    def mask(self):
        return ragged_mask()

    def test_outputs_are_as_wide_as_said(self, encoder, tokens, mask):
        assert encoder(tokens, mask).shape == (*mask.shape, encoder.out_width)

    def test_every_parameter_gets_a_gradient(self, encoder, tokens, mask):
        outputs = encoder.train()(tokens.requires_grad_(), mask)
        (outputs * torch.randn_like(outputs)).sum().backward()
        for name, parameter in encoder.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > LEAST, name

    def test_no_layer_is_used_twice(self, encoder, tokens, mask):
        calls = Counter()
        for name, module in encoder.named_modules(remove_duplicate=True):
            if not list(module.children()):
                module.register_forward_hook(lambda *_, name=name: calls.update([name]))
        encoder(tokens, mask)
        assert all(count == 1 for count in calls.values()), calls

    def test_a_token_feels_the_others_that_it_should(self, encoder, bidirectional, tokens, mask):
        last = LENGTHS[0] - 1
        tokens.requires_grad_()
        assert (felt(encoder, tokens, mask, by=last, of=0) > LEAST) == encoder.mixes_tokens
        assert (felt(encoder, tokens, mask, by=0, of=last) > LEAST) == bidirectional

    def test_a_causal_encoder_does_not_look_ahead(self, encoder, bidirectional, tokens, mask):
        changed = tokens.clone()
        changed[:, 5:] *= -2.0
        before, after = encoder(tokens, mask), encoder(changed, mask)
        assert not torch.allclose(before[0, 5:], after[0, 5:])
        same = torch.allclose(before[:, :5], after[:, :5], rtol=1e-12, atol=1e-12)
        assert same == (not bidirectional)

    def test_an_item_does_not_feel_its_batch(self, encoder, tokens, mask):
        together = encoder(tokens, mask)
        for row, length in enumerate(LENGTHS):
            alone = encoder(tokens[row : row + 1, :length], mask[row : row + 1, :length])
            torch.testing.assert_close(together[row, :length], alone[0], rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("value", [1e3, float("nan"), float("inf")])
    def test_padding_is_invisible_and_its_outputs_are_zero(self, encoder, tokens, mask, value):
        clean = encoder(tokens.masked_fill(~mask[..., None], 0.0), mask)
        parameters = list(encoder.parameters())
        wanted = torch.autograd.grad(clean.square().sum(), parameters) if parameters else ()
        dirty_tokens = tokens.masked_fill(~mask[..., None], value).requires_grad_()
        dirty = encoder(dirty_tokens, mask)
        torch.testing.assert_close(clean, dirty, rtol=1e-12, atol=1e-12)
        assert (dirty[~mask] == 0).all()
        dirty.square().sum().backward()
        assert (dirty_tokens.grad[~mask] == 0).all()
        for parameter, gradient in zip(parameters, wanted, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)

    def test_mixed_precision_stays_near(self, encoder, tokens, mask):
        encoder = encoder.float()
        tokens = tokens.bfloat16().requires_grad_()
        expected = encoder(tokens.float(), mask)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = encoder(tokens, mask)
        torch.testing.assert_close(outputs.float(), expected, rtol=0.1, atol=0.1)
        outputs.float().square().sum().backward()
        assert tokens.grad.isfinite().all()


def felt(encoder, tokens, mask, *, by, of):
    """The largest gradient of the output of token `by` of the first item with respect to its token `of`."""
    output = encoder(tokens, mask)[0, by]
    torch.manual_seed(2)
    (gradient,) = torch.autograd.grad((output * torch.randn(len(output))).sum(), tokens)
    return gradient[0, of].abs().max().item()
