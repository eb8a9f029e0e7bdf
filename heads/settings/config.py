"""What a head is and how it is trained: two frozen configs, from YAML, options and defaults.

The file has two sections, `head:` and `train:`, with the field names of the classes below. No name occurs in both, so
the options of `agiqa train` are flat; they are made from these fields. The first sentence of a field's docstring is the
help of its option, its `examples` are the built-in names. Precedence, highest first: option, file,
the head that a training starts from, preset, default.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import yaml
from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, field_validator, model_validator

from agiqa.errors import ConfigError, UnknownName
from agiqa.heads.settings.presets import preset_values

CLOSED_FORMS = ("ridge", "krr", "tfidf", "stack", "rating-words")
"""Encoders that are fitted in closed form, without epochs; see heads/closed/."""
Setting = bool | int | float | str
"""The value of a setting that an encoder of one's own declares."""
OWN_SETTINGS = "own_settings"
Usual = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Gets the settings that were given, flat, and returns values for settings that were not, such as the projection that
reads a store."""


class FrozenSettings(BaseModel):
    """A frozen, keyword-only config whose every fault is a ConfigError."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    if not TYPE_CHECKING:  # a checker keeps the signature that pydantic makes from the fields

        def __init__(self, **values: object) -> None:
            for name in values:
                if name not in type(self).model_fields:
                    raise ConfigError(str(UnknownName.of("setting", name, type(self).model_fields)))
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise ConfigError(_faults(error)) from None


class HeadConfig(FrozenSettings):
    """The parts of a head, by registered name, and their sizes."""

    projection: str = Field(default="vocabulary", examples=["vocabulary", "hidden", "sketch", "logits"])
    """How features enter the encoder. `vocabulary` is W_proj on the logits, computed from hidden states; `hidden`,
    `sketch` and `logits` read the features of that encoding unchanged."""
    encoder: str = Field(
        default="xlstm", examples=["xlstm", "lstm", "gru", "mamba2", "transformer", "none", *CLOSED_FORMS]
    )
    """Sequence encoder, or a closed form, which is fitted in seconds. `agiqa train` takes `stack` by default, and
    `xlstm` where the other settings ask for a network. `ridge` and `krr` (kernel ridge) read pooled states, `tfidf` the
    n-grams of the stored token ids (where there are none, of the words of prompts and descriptions), `stack` all of
    them. `rating-words` is the expected MOS under the model's probabilities of its five rating words, without training.
    """
    pooling: str = Field(default="mean", examples=["mean", "max", "first", "last", "first-last-mean", "attention"])
    """How the tokens become one vector; `mean@answer` pools the answer's tokens only. The roles after `@` are
    `special`, `image`, `question` and `answer`."""
    width: int = Field(default=512, ge=1)
    """Channels of the projected tokens and of each direction of the encoder (d in the paper)."""
    standardise: bool = True
    """Centre and scale the features once, by statistics of the training tokens. `vocabulary` whitens hidden states; the
    other projections scale each channel. A head can learn the same functions either way, but AdamW takes other steps:
    only without it are the steps of `vocabulary` those on explicit logits, as in the paper."""
    blocks: int = Field(default=4, ge=1)
    """Blocks of xlstm. The second one is an sLSTM, the others are mLSTMs."""
    num_heads: int = Field(default=4, ge=1)
    """Heads of each xlstm block and transformer layer; must divide the width."""
    layers: int = Field(default=1, ge=1)
    """Layers of lstm, gru, mamba2 and transformer."""
    residual: bool = True
    """LayerNorm before, and a residual around, each layer of lstm and gru. The published code has plain layers."""
    state_size: int = Field(default=16, ge=1)
    """Rows of mamba2's state per channel (N in its paper)."""
    bidirectional: bool = False
    """Read each item in both directions. `transformer` drops its causal mask; `none` has no direction; the other
    encoders get a second set of weights that reads backwards, and the full width in each direction."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the encoder's activations dropped in training. With dropout, evaluation spreads predictions too far (by
    1.1 for `transformer` to 1.3 for `xlstm` at a share of .5); `calibrate` corrects that."""
    token_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of each item's tokens removed in training, drawn anew at every step. At least one token stays, and so do
    those that `first` and `last` pool. The maximum over fewer tokens is lower: set `calibrate` with `max`."""
    regressor_hidden: int = Field(default=128, ge=0)
    """Channels between the regressor's two linear layers; 0 for one layer."""
    own_settings: Mapping[str, Setting] = Field(default_factory=dict)
    """Settings that an encoder of your own declares, by name. Those left out have its default values."""
    layer_mix: Literal["concat", "softmax"] = "concat"
    """How several layers are joined. `concat` puts their channels side by side; `softmax` scales each layer on its own,
    and sums them with weights that are the softmax of learned numbers. It has no effect on one layer."""

    kernel: Literal["rbf", "linear"] = "rbf"
    """Kernel of `krr`: Gaussian, or linear, which is the ridge regression."""
    kernel_width: float | None = Field(default=None, gt=0.0)
    """Width of the Gaussian kernel, as a multiple of the median distance between training items. Inner folds choose it
    if absent."""
    strength: float | None = Field(default=None, gt=0.0)
    """Strength of the penalty of `ridge`, `krr` and `tfidf`; inner folds choose it if absent. That of the Gaussian
    kernel is a multiple of the spread of the kernel."""
    ngrams: int = Field(default=2, ge=1, le=3)
    """Tokens of the longest n-gram that `tfidf` counts."""
    members: str = "auto"
    """Closed forms of a `stack`, joined by `+`; auto is ridge+krr+tfidf, without those that cannot be fitted to the
    items."""
    rating_tokens: str | None = None
    """Token ids of the five rating words, from bad to excellent, with commas between; the store's own if absent."""
    init: str | None = Field(default=None, examples=["ridge", "krr", "tfidf", "stack"])
    """Closed form whose residual the network learns: both are added. The network starts at 0, and the closed form alone
    is epoch 0, which is kept where no epoch has a higher validation SRCC, or where fewer than 30 validation items
    choose."""
    init_pooling: str = "auto"
    """Pooled states that `init` reads, as `pooling` of a closed form; auto is mean@answer where there is an answer."""

    @property
    def is_closed(self) -> bool:
        """Whether the head is a closed form."""
        return self.encoder in CLOSED_FORMS

    @model_validator(mode="before")
    @classmethod
    def _pooling_of_closed_forms(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Closed forms pool the answer where there is one, unless told otherwise."""
        return {"pooling": "auto", **values} if values.get("encoder") in CLOSED_FORMS else values

    def __hash__(self) -> int:
        """Of all values."""
        return hash(self.model_dump_json())


class TrainConfig(FrozenSettings):
    """How a head is trained, on which labels, and which items are held out."""

    label: str = "quality"
    """Aspect whose MOS is learned, or several, as in quality+correspondence. One head then predicts them all, and
    learns each from the items that have it."""
    split: Literal["published", "grouped", "folds", "generator"] = "published"
    """Protocol: the store's own split, whole prompts, one fold of prompts, or one generator. `grouped` draws whole
    prompts by `split_seed`. `folds` deals whole prompts into parts that together hold all items, and tests on one.
    `generator` tests on the images of one generator, whose prompts may also occur in training."""
    folds: int = Field(default=5, ge=2)
    """Parts into which the split `folds` deals the prompts. They hold about equally many items."""
    fold: int = Field(default=0, ge=0)
    """Part that the split `folds` tests on, from 0."""
    held_out: str | None = None
    """Generator that the split `generator` tests on, as the store names it."""
    test_share: float = Field(default=0.2, gt=0.0, lt=1.0)
    """Share of the items that the split `grouped` tests on."""
    validation: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of training (whole prompts) that chooses the epoch. With 0 the last epoch is kept. With fewer than 30
    items, too few to choose by, it is kept too, or with `init` the closed form alone."""
    training_items: int | None = Field(default=None, ge=1)
    """Number of training and validation items to use; all if absent. `training_seed` draws them, and smaller subsets
    are nested in larger ones."""
    training_seed: int | None = Field(default=None, ge=0)
    """Seed that draws `training_items` only; `split_seed` if absent. The test part does not depend on it."""
    split_seed: int = Field(default=0, ge=0)
    """Seed that draws the test, validation and training parts. `seed` draws none of them, so runs with other seeds
    compare."""
    loss: str = Field(
        default="mse",
        examples=["mse", "mae", "huber", "plcc", "fidelity", "margin", "ranknet", "kl", "ordinal", "nll"],
    )
    """Loss on standardised labels, or a weighted sum such as mse+0.5*plcc. `plcc`, `fidelity`, `margin` and `ranknet`
    compare the items of a batch. With several labels, the loss is the mean over them. `kl`, `ordinal` and `nll` train
    heads that also predict a spread: `kl` and `ordinal` that of the single ratings, for which they need their standard
    deviation (see `soft_labels`), `nll` that of the MOS around its prediction."""
    epochs: int = Field(default=20, ge=1)
    """Passes over the training items. The schedule has this length."""
    batch_size: int = Field(default=32, ge=1)
    """Items per step."""
    lr: float = Field(default=1e-3, gt=0.0)
    """Peak learning rate of AdamW."""
    projection_lr: float | None = Field(default=None, gt=0.0)
    """Peak learning rate of the projection; `lr` times the projection's own factor if absent."""
    weight_decay: float = Field(default=1e-2, ge=0.0)
    """Decoupled weight decay of AdamW, on every parameter."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up: half a cosine down to 0, or constant."""
    warmup: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share of all steps over which the learning rate rises linearly."""
    gradient_clip: float | None = Field(default=1.0, gt=0.0)
    """Largest norm of the whole gradient. None clips nothing."""
    ema: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Decay per step of a moving average of the weights, used instead of them. The average starts without a bias to
    the first weights. Its window of 1 / (1 - `ema`) steps is at most a tenth of all steps, so short trainings decay
    faster."""
    patience: int | None = Field(default=None, ge=1)
    """Epochs without a better validation SRCC after which training stops; never if absent. With several labels the
    mean SRCC counts. Needs enough validation items to choose by."""
    calibrate: bool = False
    """Fit a line from predictions to MOS on the validation items, and keep it in the head. It needs 30 validation items
    and is fitted per label after the epoch is chosen. Use it for losses that leave the level open, and for poolings
    that differ between training and evaluation. A refit head gets the line of the head that chose the epoch."""
    refit: bool = False
    """Train again on training and validation items for the chosen number of epochs."""
    paper_compatible: bool = False
    """Also report the best epoch by test score, as the paper does, and its bias. It is never used for selection."""
    seed: int = Field(default=0, ge=0)
    """Seed of the initial weights, the order of the batches, and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; auto is cuda where there is one."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision; bf16 and fp16 are mixed, and fp16 needs CUDA. Weights and optimiser stay in fp32. fp16 scales the
    loss, and skips a step whose gradients overflow."""
    cuda_graphs: bool = True
    """Replay the encoder's training steps from CUDA graphs, which pads batches a little."""
    compile: bool = False
    """Fuse operations by torch.compile on a GPU, for long trainings. It applies to xlstm, mamba2 and transformer, takes
    20 s or more at the start, and saves a tenth to half of each step. Last digits can depend on the first batch's
    length, so a resumed training can differ in them."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of torch; unchanged if absent."""
    keep: Literal["auto", "device", "ram", "memmap", "stream"] = "auto"
    """Where decoded features are kept during training. `device` is the memory of the GPU, `memmap` a decoded copy on
    disk, `stream` RAM for what fits and the store for the rest. `auto` is the first of these that holds all features,
    else `stream`. Results are the same."""
    memory: ByteSize | None = Field(default=None, gt=0)
    """Memory for decoded features, as in 8GB; 80 % of the free GPU memory or 60 % of the free RAM if absent."""
    save_seconds: float = Field(default=30.0, ge=0.0)
    """Seconds between two saves of the training, at the end of an epoch; 0 for every epoch. A killed training resumes
    from the last save."""
    tensorboard: bool = False
    """Write event files for TensorBoard to RUN/tensorboard; needs `agiqa[tensorboard]`."""
    layer: str | None = None
    """Layer of the store that is read, such as 16, or several, as in 8+16+last. `0` is the embeddings, `8` the output
    of block 8, `last` or -1 the states after the final norm. If absent: the last one that the store has; `agiqa train`
    gives closed forms up to five layers."""
    variant: str | None = None
    """Conversation to read the store as, such as id of a store of full; its own if absent. The store's conversations
    must begin with it: `question` ends with the describing question, `described` with the description, `id` with the
    rating question."""
    soft_labels: Literal["gaussian", "counts"] = "gaussian"
    """Shares of the ratings on five levels that `kl` and `ordinal` learn. `gaussian` takes those of a Gaussian with the
    MOS and the standard deviation of an image; `counts` those that were counted."""
    label_std: float | None = Field(default=None, gt=0.0)
    """Standard deviation of the ratings, on the MOS scale, of images that have none in the store. Without it, `kl` and
    `ordinal` refuse them."""
    calibration_share: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the validation items (whole prompts) that make conformal intervals only, and do not choose the epoch.
    With 0, all validation items do both, which costs about one point of coverage with 100 validation items."""
    weights: Literal["equal", "deviation"] = "equal"
    """Weights of the training items: equal, or 1 / (std^2 + s^2) with the standard deviation of the ratings of each
    item and its median s. The store needs the column std_LABEL."""
    inner_folds: int = Field(default=5, ge=2)
    """Folds of whole prompts, within the training items, that choose the settings of closed forms."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The names that `label` joins. Raises as `parse_labels`."""
        from agiqa.heads.settings.labels import parse_labels  # its numpy would slow `agiqa train --help` down

        return parse_labels(self.label)

    @field_validator("label")
    @classmethod
    def _spelled_one_way(cls, label: str) -> str:
        from agiqa.heads.settings.labels import parse_labels

        return "+".join(parse_labels(label))

    @field_validator("layer", mode="before")
    @classmethod
    def _layers_as_text(cls, layer: object) -> object:
        """YAML reads `layer: 8` as a number."""
        whole = isinstance(layer, int) and not isinstance(layer, bool)
        return str(layer) if whole else "".join(layer.split()) if isinstance(layer, str) else layer

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
    usual: Usual | None = None,
) -> tuple[HeadConfig, TrainConfig]:
    """Both configs: `overrides` (flat; None: not given), then the sections of `file`, the head of `start`, `preset`.

    The first that gives a setting decides; without any, `usual` does, such as `usual_settings` of the store, and then
    the default of the class. Raises ConfigError for a file that is no such YAML, an unknown key or a value out of
    range, and UnknownName for the preset; and as `usual`.
    """
    sections = _read_sections(file) if file is not None else {"head": {}, "train": {}}
    for name, value in (overrides or {}).items():
        if value is not None:
            section = sections[_section_of(name)]
            section[name] = (
                {**section.get(name, {}), **value} if name == OWN_SETTINGS and isinstance(value, Mapping) else value
            )
    for name, value in ({} if start is None else start.model_dump()).items():
        sections["head"].setdefault(name, value)
    if preset is not None:
        chosen = {**sections["head"], **sections["train"]}
        for name, value in preset_values(preset, chosen).items():
            sections[_section_of(name)].setdefault(name, value)
    if usual is not None:
        for name, value in usual({**sections["head"], **sections["train"]}).items():
            sections[_section_of(name)].setdefault(name, value)
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

    An older agiqa used these values for settings that its record lacks, except for those that `complete_settings` of
    evaluation/runs.py adds.
    """
    return {**HeadConfig().model_dump(mode="json"), **TrainConfig().model_dump(mode="json")}
