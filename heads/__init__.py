"""Heads: small networks that learn MOS from a feature store, without the model that made it.

config.py      HeadConfig and TrainConfig, from YAML, options, presets and defaults
labels.py      what a head learns: one label, or several joined by `+`
presets.py     `paper` and `published`, and what differs from the released code
features.py    a store's tokens: kept, mapped or streamed
feeding.py     where the rows of a training are kept
decoded.py     the decoded copy on disk
memory.py      how much is free
batches.py     padded batches, bucketed by length
worker_batches.py  batches for loops of one's own, with worker processes
projection.py  features to the width of the head: `vocabulary`, `sketch`, `hidden`, `logits`
encoders/      sequence encoders: `xlstm`, `lstm`, `gru`, `mamba2`, `transformer`, `none`
pooling.py     tokens to one vector: mean, max, last, first, attention, each over all tokens or a role
regressor.py   one vector to the MOS of each label
head.py        the four in a row
losses.py      regression, correlation and ranking losses, and weighted sums of them
metrics.py     SRCC, PLCC, KRCC, RMSE with intervals by prompt
logistic.py    the mapping that PLCC and RMSE are also reported after, fitted on validation
rating_words.py  the word of a MOS, the word in an answer, and how well they agree
uncertainty.py  standard errors over prompts and seeds, intervals, p-values
comparing.py   heads over seeds, and one against another: intervals and p-values
prompts.py     when two prompts are the same
holding_out.py  the items that a split holds out: published, by prompt, a fold, a generator
splits.py      train, validation and test parts, and the leak between them
outcome.py     what a fit tells: curves, and which epoch was kept
events.py      the same for TensorBoard
learner.py     steps, schedule and the choice of the epoch
resuming.py    the state of a training, so that a killed one goes on
fitting.py     one fit: device, random state, trainer
starting.py    another run's head as the beginning
paper_compatible.py  the best epoch by test score, as the paper reports it, and its bias
training.py    from a store to a run folder
recorded_parts.py  the items that trained a head, and who is among them
runs.py        the run folder, and which stores it can read
scoring.py     predict and evaluate
sweeping.py    many heads over one store
head_jobs.py   one of them: what it is, whether it is there, one attempt at it
job_workers.py  the processes that train them
sharing.py     features that all of them read
shared_memory.py  memory that processes map together
progress.py    a bar on a terminal, lines elsewhere
"""

from agiqa.heads.comparing import holm, paired, seeds_score
from agiqa.heads.config import HeadConfig, TrainConfig, load_settings
from agiqa.heads.encoders import ENCODERS
from agiqa.heads.features import FeatureSource
from agiqa.heads.head_jobs import HeadJob, JobOutcome
from agiqa.heads.losses import LOSSES
from agiqa.heads.pooling import POOLINGS
from agiqa.heads.progress import LineProgress, TrainingProgress, training_progress
from agiqa.heads.projection import PROJECTIONS
from agiqa.heads.rating_words import score_words
from agiqa.heads.runs import Run, load_run
from agiqa.heads.scoring import evaluate, predict
from agiqa.heads.sweeping import train_heads
from agiqa.heads.training import train_head
from agiqa.heads.worker_batches import FeatureBatches

__all__ = [
    "ENCODERS",
    "LOSSES",
    "POOLINGS",
    "PROJECTIONS",
    "FeatureBatches",
    "FeatureSource",
    "HeadConfig",
    "HeadJob",
    "JobOutcome",
    "LineProgress",
    "Run",
    "TrainConfig",
    "TrainingProgress",
    "evaluate",
    "holm",
    "load_run",
    "load_settings",
    "paired",
    "predict",
    "score_words",
    "seeds_score",
    "train_head",
    "train_heads",
    "training_progress",
]
