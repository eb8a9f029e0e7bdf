"""What a head is and how it is trained: two frozen configs, from YAML, options and defaults.

The file has two sections, `head:` and `train:`, with the field names of the classes below. Options of the
command line are flat, since no name occurs in both. An option beats the file, which beats the head that a training
starts from (experiment.py), which beats the preset (presets.py), which beats the default.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import yaml
from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, field_validator, model_validator

from agiqa.errors import ConfigError, UnknownName
from agiqa.heads.settings.labels import parse_labels
from agiqa.heads.settings.presets import preset_values


class _Settings(BaseModel):
    """A frozen, keyword-only config whose every fault is a ConfigError."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    if not TYPE_CHECKING:  # a checker keeps the signature that pydantic makes from the fields

        def __init__(self, **values: object) -> None:
            for name in values:
                if name not in type(self).model_fields:
                    raise ConfigError(str(UnknownName.of("setting", name, type(self).model_fields)))
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise ConfigError(_faults(error)) from None


class HeadConfig(_Settings):
    """The parts of a head, by registered name, and their sizes."""

    projection: str = "vocabulary"
    """How features become the encoder's input: `vocabulary` or `hidden` from hidden states, `sketch`, or `logits`."""
    encoder: str = "xlstm"
    """The sequence encoder: `xlstm`, `lstm`, `gru`, `mamba2`, `transformer` or `none`."""
    pooling: str = "mean"
    """How the tokens become one vector: `mean`, `max`, `first`, `last`, `first-last-mean` or `attention`, over all
    tokens or, as in `mean@answer`, those of one role: `special`, `image`, `question` or `answer`."""
    width: int = Field(default=512, ge=1)
    """Channels of the projected tokens and of the encoder, in each of its directions (d of the paper)."""
    standardise: bool = True
    """Centre and scale the features once, by statistics of the training tokens: `vocabulary` whitens hidden states, the
    other projections scale each channel. The functions that a head can learn stay the same, the steps of AdamW do not:
    only with False are those of `vocabulary` the steps on explicit logits, as in the paper."""
    blocks: int = Field(default=4, ge=1)
    """Blocks of `xlstm`; the one at index 1 is an sLSTM, the others are mLSTMs."""
    num_heads: int = Field(default=4, ge=1)
    """Heads of every block of `xlstm` and every layer of `transformer`; must divide the width."""
    layers: int = Field(default=1, ge=1)
    """Layers of `lstm`, `gru`, `mamba2` and `transformer`."""
    residual: bool = True
    """Whether each layer of `lstm` and `gru` has a LayerNorm before it and a residual around it, with a norm at the
    end. False is the plain stack of the published code."""
    state_size: int = Field(default=16, ge=1)
    """Rows of the state of `mamba2` (N of its paper), per channel; 16 is the published setting."""
    bidirectional: bool = False
    """Whether tokens feel later tokens too, in every encoder but `none`. `transformer` then drops its causal mask; the
    others read each item from both ends, with weights of their own and the full width in each direction."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of activations dropped in training, within the encoder; `none` has none to drop. Dropout before a norm lets
    training pool values that spread less than those of evaluation, so that predictions spread too far: with a share of
    .5 by a factor of 1.1 (`transformer`) to 1.3 (`xlstm`). `calibrate` takes that off."""
    token_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the tokens of each item that are taken out of its sequence in training, drawn anew at every step. Those
    that the pooling reads by their place (`first`, `last`) stay, and one token at least. The maximum of fewer tokens is
    lower: with `max` pooling set `calibrate` too."""
    regressor_hidden: int = Field(default=128, ge=0)
    """Channels between the two linear layers of the regressor; 0 is one linear layer."""


class TrainConfig(_Settings):
    """How a head is trained, on which labels, and which items are held out."""

    label: str = "quality"
    """The aspect whose MOS is learned, or several joined by `+`, as in `quality+correspondence`: one head then predicts
    them all, and every item of the split must have them all."""
    split: Literal["published", "grouped", "folds", "generator"] = "published"
    """Which items are only tested on. `published`: the split of the store; `grouped`: whole prompts, drawn by
    `split_seed`; `folds`: one of several parts of whole prompts, which together are all items; `generator`: the images
    of one generator, whose prompts may also occur in training."""
    folds: int = Field(default=5, ge=2)
    """Parts of about the same number of items that `folds` deals the prompts into, by `split_seed`."""
    fold: int = Field(default=0, ge=0)
    """The part that `folds` tests on, from 0."""
    held_out: str | None = None
    """The generator that `generator` tests on, as the store's item table calls it."""
    test_share: float = Field(default=0.2, gt=0.0, lt=1.0)
    """Share of the items that `grouped` holds out."""
    validation: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the training part, whole prompts, that chooses the epoch; 0 keeps the last epoch, and so do fewer than
    30 items, which are too few to choose by."""
    training_items: int | None = Field(default=None, ge=1)
    """Use only so many of the items outside of the test part, training and validation together: the first of a random
    order by `training_seed`, so that 10 are among 30. None uses all."""
    training_seed: int | None = Field(default=None, ge=0)
    """Draws the `training_items` and nothing else, so that other items can be drawn beside the same test part; None is
    `split_seed`."""
    split_seed: int = Field(default=0, ge=0)
    """Draws the test part of `grouped`, the folds, the validation part and, without a `training_seed`, the
    `training_items`; apart from `seed`, so that seeds compare."""
    loss: str = "mse"
    """The loss on labels scaled to mean 0 and variance 1: `mse`, `mae`, `huber`, `plcc`, `fidelity`, `margin` or
    `ranknet`, or a weighted sum such as `mse+0.5*plcc`. The last four compare the items of a batch. Of several labels
    it is the mean of the loss of each."""
    epochs: int = Field(default=20, ge=1)
    """Passes over the training items, and the length of the schedule."""
    batch_size: int = Field(default=32, ge=1)
    """Items per step."""
    lr: float = Field(default=1e-3, gt=0.0)
    """Peak learning rate of AdamW."""
    projection_lr: float | None = Field(default=None, gt=0.0)
    """The projection's own peak learning rate; None is `lr` times the projection's `lr_scale`."""
    weight_decay: float = Field(default=1e-2, ge=0.0)
    """Decoupled weight decay of AdamW, on every parameter."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """What follows the warm-up: half a cosine down to 0, or the peak throughout."""
    warmup: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share of all steps over which the learning rate rises linearly."""
    gradient_clip: float | None = Field(default=1.0, gt=0.0)
    """Largest norm of the whole gradient; None clips nothing."""
    ema: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Decay per step of a moving average of the weights, which is validated and kept; None keeps the weights. It is a
    mean over the steps so far, those before weighing less, in which the first weights count no more than others. Its
    window of 1 / (1 - `ema`) steps is at most a tenth of all steps: in short trainings the decay is less than `ema`."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after so many epochs without a better validation SRCC (of several labels the mean), where there are enough
    validation items to choose by; None runs all epochs."""
    calibrate: bool = False
    """Fit a line from predictions to MOS on the validation items (30 at least) once the epoch is chosen, for each
    label, and put it into the head: for a loss that leaves the level open, or a pooling that differs between training
    and evaluation. A refit head gets the line of the head that chose the epoch."""
    refit: bool = False
    """Train again on training + validation items for the chosen number of epochs."""
    paper_compatible: bool = False
    """Also follow the test scores of every epoch, and tell the best epoch by them beside the honest number, with the
    difference: what the published protocol reports. No choice hears of it."""
    seed: int = Field(default=0, ge=0)
    """Of the initial weights, the order of the batches, and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` is cuda where there is one."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """`bf16` and `fp16` compute in mixed precision; weights and optimiser stay in fp32. `fp16` scales the loss so that
    small gradients do not vanish, skips a step whose gradients overflow, and needs CUDA."""
    cuda_graphs: bool = True
    """Whether a GPU replays the encoder's training steps from CUDA graphs, for which batches are padded a little."""
    compile: bool = False
    """Whether torch.compile fuses the operations within the blocks of `xlstm`, `mamba2` and `transformer` on a GPU.
    That takes twenty seconds or more at the start, and saves a tenth to half of a step: for many items or epochs. Last
    digits may follow from the first batch's length, so a training that goes on after a kill may differ in them."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of torch while training; None leaves them as they are."""
    keep: Literal["auto", "device", "ram", "memmap", "stream"] = "auto"
    """Where the decoded features are during training: the memory of `device`, RAM, a decoded copy on disk that is
    mapped, or RAM for what fits there with the rest read from the store for every batch. `auto` is the first of these
    that holds all of them, else `stream`. The numbers are the same."""
    memory: ByteSize | None = Field(default=None, gt=0)
    """Bytes of decoded features to hold at most, in RAM or in the memory of the device, as in `8GB`; None is 80 % of
    what is free on the device and 60 % of what is free in RAM."""
    save_seconds: float = Field(default=30.0, ge=0.0)
    """Seconds between two saves of the training under way, at the end of an epoch; 0 saves every epoch. A training
    that is killed and run again goes on from the last."""
    tensorboard: bool = False
    """Whether event files for TensorBoard are written, which needs `agiqa[tensorboard]`."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The names that `label` joins. Raises as `parse_labels`."""
        return parse_labels(self.label)

    @field_validator("label")
    @classmethod
    def _spelled_one_way(cls, label: str) -> str:
        return "+".join(parse_labels(label))

    @model_validator(mode="after")
    def _nothing_for_another_split(self) -> "TrainConfig":
        if self.fold >= self.folds:
            message = f"`fold` is {self.fold}, and of {self.folds} `folds` the last is number {self.folds - 1}"
        elif self.fold and self.split != "folds":
            message = f"`fold` is {self.fold}, which goes with the split 'folds', and the split is {self.split!r}"
        elif self.held_out is not None and self.split != "generator":
            held_out = f"`held_out` is {self.held_out!r}"
            message = f"{held_out}, which goes with the split 'generator', and the split is {self.split!r}"
        else:
            return self
        raise ConfigError(message)


def load_settings(
    file: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    preset: str | None = None,
    start: HeadConfig | None = None,
    projection: str | None = None,
) -> tuple[HeadConfig, TrainConfig]:
    """Both configs: `overrides` (flat; None means not given) beat the sections of `file`, which beat those of `preset`.

    The head of `start` stands between the file and the preset. `projection` is used where none of them names one, such
    as `usual_projection` of the store; what else none of them gives is the default. Raises ConfigError for a file that
    is no such YAML, an unknown key or a value out of range, and UnknownName for the preset.
    """
    sections = _read_sections(file) if file is not None else {"head": {}, "train": {}}
    for name, value in (overrides or {}).items():
        if value is not None:
            sections[_section_of(name)][name] = value
    for name, value in ({} if start is None else start.model_dump()).items():
        sections["head"].setdefault(name, value)
    if preset is not None:
        chosen = {**sections["head"], **sections["train"]}
        for name, value in preset_values(preset, chosen).items():
            sections[_section_of(name)].setdefault(name, value)
    if projection is not None:
        sections["head"].setdefault("projection", projection)
    try:
        return HeadConfig(**sections["head"]), TrainConfig(**sections["train"])
    except ConfigError as error:
        if file is not None:
            error.add_note(f"while reading {file} and the options given")
        raise


def read_yaml(file: Path) -> object:
    """What the YAML of `file` says; None for an empty one. Raises ConfigError, naming the file, for no YAML."""
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        message = f"{file} cannot be read as YAML: {error}"
        raise ConfigError(message) from error


def _section_of(name: str) -> str:
    """`head` or `train`, whichever has the setting. Raises ConfigError when neither has."""
    for section, settings in (("head", HeadConfig), ("train", TrainConfig)):
        if name in settings.model_fields:
            return section
    known = [*HeadConfig.model_fields, *TrainConfig.model_fields]
    raise ConfigError(str(UnknownName.of("setting", name, known)))


def _read_sections(file: Path) -> dict[str, dict[str, Any]]:
    """The sections `head` and `train` of a YAML file, each empty when absent."""
    content = _mapping(f"{file}", read_yaml(file))
    for name in content:
        if name not in ("head", "train"):
            raise ConfigError(f"{file}: " + str(UnknownName.of("section", name, ("head", "train"))))
    return {name: _mapping(f"{file}, section {name!r}", content.get(name)) for name in ("head", "train")}


def _mapping(where: str, value: object) -> dict[str, Any]:
    """`value` as a new dict with text keys; an empty section is an empty dict."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        message = f"{where}: expected keys and values, found {type(value).__name__}."
        raise ConfigError(message)
    return {str(key): item for key, item in cast("dict[object, Any]", value).items()}


def _faults(error: ValidationError) -> str:
    """One line per value that pydantic refused, or for values that contradict each other."""
    lines = [
        f"{'.'.join(str(step) for step in fault['loc'])}: {fault['msg']} (given: {fault['input']!r})"
        if fault["loc"]
        else fault["msg"].removeprefix("Value error, ")
        for fault in error.errors()
    ]
    return "Settings out of range:\n" + "\n".join(f"  {line}" for line in lines)


def default_settings() -> dict[str, Any]:
    """The settings of a HeadConfig and a TrainConfig by default, ready for JSON.

    Those that the record of an older agiqa lacks were these, but for what `as_recorded` of evaluation/runs.py says.
    """
    return {**HeadConfig().model_dump(mode="json"), **TrainConfig().model_dump(mode="json")}
