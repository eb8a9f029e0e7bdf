"""Phase 1: data sets, conversations, backbones, and the job that fills a store with what they make of each other."""

from agiqa.extract.asking import Described, Describer, DescriptionSettings
from agiqa.extract.backbones import Backbone, GenerationSettings, Prepared, open_backbone
from agiqa.extract.datasets import load_data_set
from agiqa.extract.describing import DescriptionResult, run_descriptions
from agiqa.extract.items import DataSet, Item, Message
from agiqa.extract.job import ExtractionResult, ExtractionSettings, run_extraction
from agiqa.extract.plan import LengthRule

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
