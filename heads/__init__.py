"""Heads: small networks that learn MOS from a feature store, without the model that made it."""

from typing import TYPE_CHECKING

from agiqa.lazy import lazy_names

if TYPE_CHECKING:
    from agiqa.heads.data.batches import FeatureBatches as FeatureBatches
    from agiqa.heads.data.features import FeatureSource as FeatureSource
    from agiqa.heads.evaluation.metrics import paired as paired
    from agiqa.heads.evaluation.metrics import seeds_score as seeds_score
    from agiqa.heads.evaluation.rating_words import score_words as score_words
    from agiqa.heads.evaluation.runs import Run as Run
    from agiqa.heads.evaluation.runs import load_run as load_run
    from agiqa.heads.evaluation.scoring import evaluate as evaluate
    from agiqa.heads.evaluation.scoring import predict as predict
    from agiqa.heads.evaluation.significance import holm as holm
    from agiqa.heads.model.encoders import ENCODERS as ENCODERS
    from agiqa.heads.model.losses import LOSSES as LOSSES
    from agiqa.heads.model.pooling import POOLINGS as POOLINGS
    from agiqa.heads.model.projection import PROJECTIONS as PROJECTIONS
    from agiqa.heads.settings.config import HeadConfig as HeadConfig
    from agiqa.heads.settings.config import TrainConfig as TrainConfig
    from agiqa.heads.settings.config import load_settings as load_settings
    from agiqa.heads.sweeps.head_jobs import HeadJob as HeadJob
    from agiqa.heads.sweeps.head_jobs import JobOutcome as JobOutcome
    from agiqa.heads.sweeps.sweeping import train_heads as train_heads
    from agiqa.heads.training.progress import LineProgress as LineProgress
    from agiqa.heads.training.progress import TrainingProgress as TrainingProgress
    from agiqa.heads.training.progress import training_progress as training_progress
    from agiqa.heads.training.training import train_head as train_head

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "data.batches": ["FeatureBatches"],
        "data.features": ["FeatureSource"],
        "evaluation.metrics": ["paired", "seeds_score"],
        "evaluation.rating_words": ["score_words"],
        "evaluation.runs": ["Run", "load_run"],
        "evaluation.scoring": ["evaluate", "predict"],
        "evaluation.significance": ["holm"],
        "model.encoders": ["ENCODERS"],
        "model.losses": ["LOSSES"],
        "model.pooling": ["POOLINGS"],
        "model.projection": ["PROJECTIONS"],
        "settings.config": ["HeadConfig", "TrainConfig", "load_settings"],
        "sweeps.head_jobs": ["HeadJob", "JobOutcome"],
        "sweeps.sweeping": ["train_heads"],
        "training.progress": ["LineProgress", "TrainingProgress", "training_progress"],
        "training.training": ["train_head"],
    },
)
