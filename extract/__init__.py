"""Phase 1: data sets, conversations, backbones, and the job that computes features and fills a store with them."""

from typing import TYPE_CHECKING

from agiqa.lazy import lazy_names

if TYPE_CHECKING:
    from agiqa.extract.data.datasets import load_data_set as load_data_set
    from agiqa.extract.data.items import DataSet as DataSet
    from agiqa.extract.data.items import Item as Item
    from agiqa.extract.data.items import Message as Message
    from agiqa.extract.describing.asking import Described as Described
    from agiqa.extract.describing.asking import Describer as Describer
    from agiqa.extract.describing.asking import DescriptionSettings as DescriptionSettings
    from agiqa.extract.describing.describing import DescriptionResult as DescriptionResult
    from agiqa.extract.describing.describing import run_descriptions as run_descriptions
    from agiqa.extract.filling.job import ExtractionResult as ExtractionResult
    from agiqa.extract.filling.job import ExtractionSettings as ExtractionSettings
    from agiqa.extract.filling.job import run_extraction as run_extraction
    from agiqa.extract.filling.plan import LengthRule as LengthRule
    from agiqa.extract.models.contract import Backbone as Backbone
    from agiqa.extract.models.contract import GenerationSettings as GenerationSettings
    from agiqa.extract.models.contract import Prepared as Prepared
    from agiqa.extract.models.opening import open_backbone as open_backbone

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "data.datasets": ["load_data_set"],
        "data.items": ["DataSet", "Item", "Message"],
        "describing.asking": ["Described", "Describer", "DescriptionSettings"],
        "describing.describing": ["DescriptionResult", "run_descriptions"],
        "filling.job": ["ExtractionResult", "ExtractionSettings", "run_extraction"],
        "filling.plan": ["LengthRule"],
        "models.contract": ["Backbone", "GenerationSettings", "Prepared"],
        "models.opening": ["open_backbone"],
    },
)
