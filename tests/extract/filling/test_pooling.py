"""Pooled rows of one item, against float64 in NumPy."""

import numpy as np
import pytest
import torch

from agiqa.errors import ConfigError, UnknownName
from agiqa.extract.filling.pooling import lacking, parse_poolings, pooled, pooled_roles
from agiqa.store import TOKEN_ROLES

ROLES = np.array([0, 1, 1, 1, 0, 2, 2, 0, 3, 3, 0], np.uint8)
"""An image in one run, a question, an answer, and special tokens between."""


def expected(name, states):
    """The row of one pooling by NumPy."""
    method, _, role = name.partition("@")
    chosen = states[TOKEN_ROLES[role] == ROLES] if role else states
    return {"mean": chosen.mean(axis=0), "max": chosen.max(axis=0), "first": chosen[0], "last": chosen[-1]}[method]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_those_of_numpy(dtype):
    names = [f"{method}{role}" for method in ("mean", "max", "first", "last") for role in ("", "@image", "@special")]
    random = torch.Generator().manual_seed(0)
    states = {layer: torch.randn(len(ROLES), 6, generator=random).to(dtype) for layer in ("4", "last")}
    states["8"] = torch.randn(len(ROLES), 3, generator=random).to(dtype)  # another width, as the stages of a CNN have
    found = pooled(parse_poolings(",".join(names)), states, dict.fromkeys(states, ROLES))
    for layer, given in states.items():
        wide = given.double().numpy()
        assert found[layer].dtype == dtype
        for row, name in zip(found[layer], names, strict=True):
            wanted = torch.from_numpy(expected(name, wide)).to(dtype)
            torch.testing.assert_close(row, wanted, rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=1e-6)


def test_means_are_taken_in_float32():
    """In bfloat16 a sum of 1,000 ones ends at 256."""
    states = {"last": torch.ones(1000, 2, dtype=torch.bfloat16)}
    roles = {"last": np.zeros(1000, np.uint8)}
    assert pooled(parse_poolings("mean"), states, roles)["last"].tolist() == [[1.0, 1.0]]


def test_roles_of_rows():
    poolings = parse_poolings("mean,max,first,last,mean@image,last@answer,first@question")
    assert pooled_roles(poolings, ROLES).tolist() == [0, 0, 0, 0, 1, 3, 2]
    assert pooled_roles(parse_poolings("first,last"), ROLES[1:10]).tolist() == [1, 3]


def test_an_item_without_tokens_of_a_role():
    poolings = parse_poolings("mean@image,last")
    assert lacking(poolings, ROLES) is None
    assert lacking(poolings, ROLES[5:]) == (
        "it has no tokens for --pool-tokens mean@image; its tokens are of the roles special, question, answer."
    )


@pytest.mark.parametrize(
    ("written", "error", "message"),
    [
        ("meen@image", UnknownName, "No pooling of tokens is called 'meen'. Did you mean 'mean'?"),
        ("mean@picture", UnknownName, "No role of tokens is called 'picture'"),
        ("mean@", ConfigError, "'mean@' names no role"),
        ("mean,last,mean", ConfigError, "--pool-tokens has 'mean' twice"),
    ],
)
def test_what_is_no_pooling_is_refused(written, error, message):
    with pytest.raises(error, match=message):
        parse_poolings(written)


def test_lists_may_be_texts_or_sequences():
    assert [str(one) for one in parse_poolings(["mean@image", "last"])] == ["mean@image", "last"]
    assert parse_poolings("mean@image, last") == parse_poolings(["mean@image", "last"])
    assert parse_poolings(()) == ()
