"""Phase 1: data sets, conversations, backbones, and the job that fills a store with what they make of each other."""

from agiqa.extract.data.datasets import load_data_set
from agiqa.extract.data.items import DataSet, Item, Message
from agiqa.extract.describing.asking import Described, Describer, DescriptionSettings
from agiqa.extract.describing.describing import DescriptionResult, run_descriptions
from agiqa.extract.filling.job import ExtractionResult, ExtractionSettings, run_extraction
from agiqa.extract.filling.plan import LengthRule
from agiqa.extract.models import Backbone, GenerationSettings, Prepared, open_backbone

__all__ = [
    "Backbone",
    "DataSet",
    "Described",
    "Describer",
    "DescriptionResult",
    "DescriptionSettings",
    "ExtractionResult",
    "ExtractionSettings",
    "GenerationSettings",
    "Item",
    "LengthRule",
    "Message",
    "Prepared",
    "load_data_set",
    "open_backbone",
    "run_descriptions",
    "run_extraction",
]
