"""agiqa: extract the features of a multimodal LLM once, train MOS heads from them in minutes.

    import agiqa

    agiqa.extract("photos", "photos-features", model="openbmb/MiniCPM-Llama3-V-2_5")
    run = agiqa.train("photos-features", "photos-head", encoder="gru", epochs=30)
    run.predictions, run.curves, run.predict("other-features")
    for one in agiqa.score(["new.png"], "a red bird", run=run, model="openbmb/MiniCPM-Llama3-V-2_5"):
        print(one)

Everything is imported when it is first used. The rooms (sub-packages), in the order of the data flow, have more:
`agiqa.extract` (phase 1), `agiqa.store` (the feature store), `agiqa.heads` (phase 2), `agiqa.bench` (experiments and
benchmarks with the other three).
"""

from typing import TYPE_CHECKING

from agiqa.lazy import lazy_names
from agiqa.version import agiqa_version

if TYPE_CHECKING:
    from agiqa.describing import describe as describe
    from agiqa.errors import AgiqaError as AgiqaError
    from agiqa.extract.filling.extraction import extract as extract
    from agiqa.heads.data.splits import make_partition as make_partition
    from agiqa.heads.evaluation.metrics import evaluate_scores as evaluate_scores
    from agiqa.heads.evaluation.runs import Run as Run
    from agiqa.heads.evaluation.runs import load_run as load_run
    from agiqa.heads.model.encoders import ENCODERS as ENCODERS
    from agiqa.heads.model.encoders import EitherWay as EitherWay
    from agiqa.heads.model.encoders import Encoder as Encoder
    from agiqa.heads.model.head import build_head as build_head
    from agiqa.heads.model.laws import check_encoder as check_encoder
    from agiqa.heads.model.laws import check_pooling as check_pooling
    from agiqa.heads.model.losses import LOSSES as LOSSES
    from agiqa.heads.model.losses import LossTerm as LossTerm
    from agiqa.heads.model.pooling import POOLINGS as POOLINGS
    from agiqa.heads.model.pooling import Pooling as Pooling
    from agiqa.heads.settings.config import HeadConfig as HeadConfig
    from agiqa.heads.settings.config import TrainConfig as TrainConfig
    from agiqa.parts import import_parts as import_parts
    from agiqa.scoring import ImageScore as ImageScore
    from agiqa.scoring import NotScored as NotScored
    from agiqa.scoring import items_to_score as items_to_score
    from agiqa.scoring import open_scorer as open_scorer
    from agiqa.scoring import score as score
    from agiqa.store.reading.store import Store as Store
    from agiqa.store.sharing.in_place import open_store as open_store
    from agiqa.training import train as train

__version__ = agiqa_version()

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "describing": ["describe"],
        "errors": ["AgiqaError"],
        "heads.data.splits": ["make_partition"],
        "heads.evaluation.metrics": ["evaluate_scores"],
        "heads.evaluation.runs": ["Run", "load_run"],
        "heads.model.encoders": ["ENCODERS", "EitherWay", "Encoder"],
        "heads.model.head": ["build_head"],
        "heads.model.laws": ["check_encoder", "check_pooling"],
        "heads.model.losses": ["LOSSES", "LossTerm"],
        "heads.model.pooling": ["POOLINGS", "Pooling"],
        "heads.settings.config": ["HeadConfig", "TrainConfig"],
        "parts": ["import_parts"],
        "scoring": ["ImageScore", "NotScored", "items_to_score", "open_scorer", "score"],
        "store.reading.store": ["Store"],
        "store.sharing.in_place": ["open_store"],
        "training": ["train"],
    },
    packages=("bench", "extract", "heads", "store"),
)
