"""Heads: small networks that learn MOS from a feature store, without the model that made it."""

from agiqa.heads.data.batches import FeatureBatches
from agiqa.heads.data.features import FeatureSource
from agiqa.heads.evaluation.comparing import holm, paired, seeds_score
from agiqa.heads.evaluation.rating_words import score_words
from agiqa.heads.evaluation.runs import Run, load_run
from agiqa.heads.evaluation.scoring import evaluate, predict
from agiqa.heads.model.encoders import ENCODERS
from agiqa.heads.model.losses import LOSSES
from agiqa.heads.model.pooling import POOLINGS
from agiqa.heads.model.projection import PROJECTIONS
from agiqa.heads.settings.config import HeadConfig, TrainConfig, load_settings
from agiqa.heads.sweeps.head_jobs import HeadJob, JobOutcome
from agiqa.heads.sweeps.sweeping import train_heads
from agiqa.heads.training.progress import LineProgress, TrainingProgress, training_progress
from agiqa.heads.training.training import train_head

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
