"""Named settings: `paper` compares encoders fairly, `published` follows the code released with the paper.

A preset overrides the defaults; a settings file and options override the preset.

`paper` is Section III of the paper (arXiv 2502.15167), controlled: every encoder has the same vocabulary projection,
width 512, mean pooling, regressor 512-128-1, MSE and AdamW, so that rows of Table IV differ by the encoder alone. Every
encoder has four layers, like the four blocks of xLSTM, and is causal. Layers of `lstm` and `gru` have a LayerNorm and a
residual, as the other encoders have: four plain LSTM layers, as in the released code, start with nearly the same pooled
vector for every item. Training has the defaults of `TrainConfig` and standardised features, since the paper's learning
rate of 1e-5 needs one step per image.

`published` has the sizes and the training of the released code for each encoder: one image per step, a constant
learning rate of 1e-5 (which the code uses for AGIQA-3k; give `--lr 2e-5` elsewhere, and `--epochs 30` for AIGCIQA-20k,
60 for AIGCIQA2023), no warm-up, no clipping, seed 42, fp16. Differences from the released code:

everywhere
- A tenth of the training items (`validation`) chooses the epoch, and the head learns from the rest. The code trained on
  all of them and chose the epoch on the test set. `--refit` trains again on all, for the chosen number of epochs.
- The precision is fp32 without CUDA, which mixed fp16 needs.
- Labels have mean 0 and variance 1 within the loss; the code used raw MOS. Steps of AdamW hardly depend on the scale,
  and a new head predicts about the mean.
- Padding is masked in encoder and pooling. At one image per step there is none; in larger batches the code averaged it.
- Regressor weights have torch's initialisation; the code used Xavier.
- No text is truncated unless the store was made so, and a failing item is an error. The code truncated at 512 tokens
  (768 for AIGCIQA-20k) and gave a failing image the score 0.
- An unknown pooling or loss is an error. The code used the mean and MSE.

xlstm
- Settings of feed-forward and stack are the same; the kernels may differ.

lstm, gru
- The layers are plain, as in the code (`residual` is False).
- The regressor has no dropout; the code dropped .2 of its 256 channels.

transformer
- Attention is over the tokens of an item. Without `batch_first` the code attended over the batch, so that at one image
  per step a token attended to itself alone.
- Layers are pre-norm with GELU, and positions are added. The code's were post-norm with ReLU, without positions.
- The regressor has a ReLU between its two layers. The code had none, which makes them one linear layer.

mamba2
- Four layers with weights of their own. The code's list held one layer four times.
- The regressor has a ReLU between its two layers, as above.

none
- Linear(V, 1024) comes before the mean over the tokens, not after it; both are linear, so the function is the same.
"""

from collections.abc import Callable, Mapping
from typing import Any

from agiqa.registry import Registry

Settings = dict[str, Any]
PRESETS: Registry[Callable[[Mapping[str, Any]], Settings]] = Registry("preset")

_DEFAULT_ENCODER = "xlstm"

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

_RELEASED: Settings = {
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
_RELEASED_RECURRENT: Settings = {
    "residual": False,
    "bidirectional": True,
    "pooling": "first-last-mean",
    "regressor_hidden": 256,
}
_RELEASED_ENCODERS: dict[str, Settings] = {
    "xlstm": {"blocks": 4, "num_heads": 4, "regressor_hidden": 128},
    "lstm": _RELEASED_RECURRENT | {"layers": 4},
    "gru": _RELEASED_RECURRENT | {"layers": 2},
    "mamba2": {"layers": 4, "state_size": 16, "regressor_hidden": 256},
    "transformer": {"layers": 6, "num_heads": 2, "dropout": 0.2, "bidirectional": True, "regressor_hidden": 256},
    "none": {"width": 1024, "regressor_hidden": 0},
}


def preset_values(name: str, chosen: Mapping[str, Any]) -> Settings:
    """The settings of a preset, flat. They depend on encoder, learning rate and device in `chosen`.

    Raises UnknownName, with the nearest preset.
    """
    return PRESETS.get(name)(chosen)


def controlled(chosen: Mapping[str, Any]) -> Settings:
    """`paper`: the same head around every encoder; a user's own encoder has the default sizes."""
    return _PAPER | _PAPER_ENCODERS.get(chosen.get("encoder", _DEFAULT_ENCODER), {})


def as_released(chosen: Mapping[str, Any]) -> Settings:
    """`published`: the released code's settings for the encoder, with one learning rate for all parameters."""
    import torch  # heavy, and only this preset needs it

    cuda = chosen.get("device") != "cpu" and torch.cuda.is_available()
    return (
        _RELEASED
        | {"precision": "fp16" if cuda else "fp32", "projection_lr": chosen.get("lr", _RELEASED["lr"])}
        | _RELEASED_ENCODERS.get(chosen.get("encoder", _DEFAULT_ENCODER), {})
    )


PRESETS.add("paper", controlled)
PRESETS.add("published", as_released)
