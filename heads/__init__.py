"""Heads: small networks that learn MOS from a feature store, without the model that made it."""

from typing import TYPE_CHECKING

from agiqa.lazy import lazy_names

if TYPE_CHECKING:
    from agiqa.heads.data.batches import FeatureBatches as FeatureBatches
    from agiqa.heads.data.features import FeatureSource as FeatureSource
    from agiqa.heads.data.splits import Partition as Partition
    from agiqa.heads.data.splits import make_partition as make_partition
    from agiqa.heads.evaluation.intervals import PredictedIntervals as PredictedIntervals
    from agiqa.heads.evaluation.intervals import predict_intervals as predict_intervals
    from agiqa.heads.evaluation.metrics import evaluate_scores as evaluate_scores
    from agiqa.heads.evaluation.metrics import paired as paired
    from agiqa.heads.evaluation.metrics import seeds_score as seeds_score
    from agiqa.heads.evaluation.rating_words import score_words as score_words
    from agiqa.heads.evaluation.runs import Run as Run
    from agiqa.heads.evaluation.runs import load_run as load_run
    from agiqa.heads.evaluation.scoring import evaluate as evaluate
    from agiqa.heads.evaluation.scoring import predict as predict
    from agiqa.heads.evaluation.significance import holm as holm
    from agiqa.heads.model.encoders import ENCODERS as ENCODERS
    from agiqa.heads.model.encoders import EitherWay as EitherWay
    from agiqa.heads.model.encoders import Encoder as Encoder
    from agiqa.heads.model.head import Head as Head
    from agiqa.heads.model.head import build_head as build_head
    from agiqa.heads.model.laws import check_encoder as check_encoder
    from agiqa.heads.model.laws import check_pooling as check_pooling
    from agiqa.heads.model.losses import LOSSES as LOSSES
    from agiqa.heads.model.losses import LossTerm as LossTerm
    from agiqa.heads.model.pooling import POOLINGS as POOLINGS
    from agiqa.heads.model.pooling import Pooling as Pooling
    from agiqa.heads.model.projection import PROJECTIONS as PROJECTIONS
    from agiqa.heads.model.projection import FeatureSpec as FeatureSpec
    from agiqa.heads.model.projection import Projection as Projection
    from agiqa.heads.searching.search import SearchResult as SearchResult
    from agiqa.heads.searching.search import SearchSettings as SearchSettings
    from agiqa.heads.searching.search import run_search as run_search
    from agiqa.heads.searching.space import Space as Space
    from agiqa.heads.searching.space import read_space as read_space
    from agiqa.heads.settings.config import HeadConfig as HeadConfig
    from agiqa.heads.settings.config import TrainConfig as TrainConfig
    from agiqa.heads.settings.config import load_settings as load_settings
    from agiqa.heads.sweeps.head_jobs import HeadJob as HeadJob
    from agiqa.heads.sweeps.head_jobs import JobOutcome as JobOutcome
    from agiqa.heads.sweeps.sweeping import train_heads as train_heads
    from agiqa.heads.sweeps.watching import SweepWatch as SweepWatch
    from agiqa.heads.sweeps.watching import watching as watching
    from agiqa.heads.training.progress import LineProgress as LineProgress
    from agiqa.heads.training.progress import TrainingProgress as TrainingProgress
    from agiqa.heads.training.progress import training_progress as training_progress
    from agiqa.heads.training.stacking import stack_runs as stack_runs
    from agiqa.heads.training.training import train_head as train_head

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "data.batches": ["FeatureBatches"],
        "data.features": ["FeatureSource"],
        "data.splits": ["Partition", "make_partition"],
        "evaluation.intervals": ["PredictedIntervals", "predict_intervals"],
        "evaluation.metrics": ["evaluate_scores", "paired", "seeds_score"],
        "evaluation.rating_words": ["score_words"],
        "evaluation.runs": ["Run", "load_run"],
        "evaluation.scoring": ["evaluate", "predict"],
        "evaluation.significance": ["holm"],
        "model.encoders": ["ENCODERS", "EitherWay", "Encoder"],
        "model.head": ["Head", "build_head"],
        "model.laws": ["check_encoder", "check_pooling"],
        "model.losses": ["LOSSES", "LossTerm"],
        "model.pooling": ["POOLINGS", "Pooling"],
        "model.projection": ["FeatureSpec", "PROJECTIONS", "Projection"],
        "searching.search": ["SearchResult", "SearchSettings", "run_search"],
        "searching.space": ["Space", "read_space"],
        "settings.config": ["HeadConfig", "TrainConfig", "load_settings"],
        "sweeps.head_jobs": ["HeadJob", "JobOutcome"],
        "sweeps.sweeping": ["train_heads"],
        "sweeps.watching": ["SweepWatch", "watching"],
        "training.progress": ["LineProgress", "TrainingProgress", "training_progress"],
        "training.stacking": ["stack_runs"],
        "training.training": ["train_head"],
    },
)
