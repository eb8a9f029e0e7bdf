"""Settings under one name: `paper` compares encoders fairly, `published` follows the code released with the paper.

A preset stands between the defaults and what a file or an option says.

`paper` is Section III of the paper (arXiv 2502.15167), controlled: around every encoder the same vocabulary
projection, width 512, mean pooling, regressor 512-128-1, MSE and AdamW, so that a row of Table IV differs from the
next by its encoder alone. Each has four layers, as many as the xLSTM has blocks, and reads forwards. Those of `lstm`
and `gru` have a LayerNorm before them and a residual around them, as the layers of the other encoders have: four
plain ones of LSTM, as the paper's code stacks them, begin with nearly the same pooled vector for every item. The
training is that of this project (`TrainConfig`), with the features standardised: at the paper's own learning rate of
1e-5 the head needs one step per image.

`published` has the sizes and the training of the released code, encoder by encoder: one image per step, a constant
learning rate of 1e-5 (which the code uses for AGIQA-3k; give `--lr 2e-5` elsewhere, and `--epochs 30` for
AIGCIQA-20k, 60 for AIGCIQA2023), no warm-up, no clipping, seed 42, fp16. What differs from the released code, and why:

everywhere
- The epoch is chosen on a tenth of the training items (`validation`), so the head learns from the other nine. The code
  trained on all of them, and chose the epoch on the test set. `--refit` trains again on all, for the chosen epochs.
- The precision is fp32 where there is no CUDA, since mixed fp16 needs it.
- Labels have mean 0 and variance 1 within the loss, where the code took MOS as it is: the steps of AdamW hardly
  feel the scale, and a fresh head begins near the mean.
- Padding is masked in encoder and pooling. At one image per step there is none; in larger batches the code averaged it.
- Weights of the regressor are drawn as torch does, where the code used Xavier.
- No text is cut off unless the store was made so, and an item that fails is an error. The code cut at 512 tokens (768
  for AIGCIQA-20k) and gave an image that failed the score 0.
- An unknown pooling or loss is an error. The code took the mean and MSE.

xlstm
- The feed-forward's and the stack's own settings are the same; the kernels may be others.

lstm, gru
- The layers are plain, as in the code (`residual` is False).
- The regressor has no dropout; the code dropped .2 of its 256 channels.

transformer
- Attention is over the tokens of an item. Without `batch_first` the code attended over the batch, so that at one image
  per step a token saw itself alone.
- Layers are pre-norm with GELU, and positions are added. The code's were post-norm with ReLU, with no positions.
- A ReLU stands between the two layers of the regressor. The code had none there, which makes them one.

mamba2
- Four layers with weights of their own. The code's list held one layer four times.
- A ReLU stands between the two layers of the regressor, as above.

none
- Linear(V, 1024) comes before the mean over the tokens, not after it; both are linear, so the function is the same.
"""

from collections.abc import Callable, Mapping
from typing import Any

from agiqa.registry import Registry

Settings = dict[str, Any]
PRESETS: Registry[Callable[[Mapping[str, Any]], Settings]] = Registry("preset")

_FIRST_ENCODER = "xlstm"

_PAPER: Settings = {
    "projection": "vocabulary",
    "pooling": "mean",
    "width": 512,
    "regressor_hidden": 128,
    "bidirectional": False,
    "residual": True,
    "loss": "mse",
}
_PAPER_ENCODERS: dict[str, Settings] = {
    "xlstm": {"blocks": 4, "num_heads": 4},
    "lstm": {"layers": 4},
    "gru": {"layers": 4},
    "mamba2": {"layers": 4, "state_size": 16},
    "transformer": {"layers": 4, "num_heads": 4},
}

_PUBLISHED: Settings = {
    "projection": "vocabulary",
    "pooling": "mean",
    "width": 512,
    "standardise": False,
    "bidirectional": False,
    "dropout": 0.0,
    "token_dropout": 0.0,
    "loss": "mse",
    "epochs": 20,
    "batch_size": 1,
    "lr": 1e-5,
    "weight_decay": 1e-5,
    "schedule": "constant",
    "warmup": 0.0,
    "gradient_clip": None,
    "ema": None,
    "patience": None,
    "refit": False,
    "seed": 42,
}
_PUBLISHED_RECURRENT: Settings = {
    "residual": False,
    "bidirectional": True,
    "pooling": "first-last-mean",
    "regressor_hidden": 256,
}
_PUBLISHED_ENCODERS: dict[str, Settings] = {
    "xlstm": {"blocks": 4, "num_heads": 4, "regressor_hidden": 128},
    "lstm": _PUBLISHED_RECURRENT | {"layers": 4},
    "gru": _PUBLISHED_RECURRENT | {"layers": 2},
    "mamba2": {"layers": 4, "state_size": 16, "regressor_hidden": 256},
    "transformer": {"layers": 6, "num_heads": 2, "dropout": 0.2, "bidirectional": True, "regressor_hidden": 256},
    "none": {"width": 1024, "regressor_hidden": 0},
}


def preset_values(name: str, chosen: Mapping[str, Any]) -> Settings:
    """The settings of a preset, flat, for the encoder, learning rate and device among those already `chosen`.

    Raises UnknownName, with the nearest preset.
    """
    return PRESETS.get(name)(chosen)


def paper(chosen: Mapping[str, Any]) -> Settings:
    """The same head around every encoder; one of a user's own takes its sizes from the defaults."""
    return _PAPER | _PAPER_ENCODERS.get(chosen.get("encoder", _FIRST_ENCODER), {})


def published(chosen: Mapping[str, Any]) -> Settings:
    """The released code's settings for the encoder, with the one learning rate that it had for all parameters."""
    import torch  # heavy, and only this preset asks for it

    cuda = chosen.get("device") != "cpu" and torch.cuda.is_available()
    return (
        _PUBLISHED
        | {"precision": "fp16" if cuda else "fp32", "projection_lr": chosen.get("lr", _PUBLISHED["lr"])}
        | _PUBLISHED_ENCODERS.get(chosen.get("encoder", _FIRST_ENCODER), {})
    )


for _preset in (paper, published):
    PRESETS.add(_preset.__name__, _preset)
