"""Before any head: a teacher explains, a model is tuned, describes the images, and fills a store with its features.

`agiqa.extract(data, store, model=...)` calls `agiqa.extract.extract`: the package itself can be called.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from agiqa.lazy import lazy_names

if TYPE_CHECKING:
    from agiqa.extract.data.datasets import load_data_set as load_data_set
    from agiqa.extract.data.importers.contract import PublishedSet as PublishedSet
    from agiqa.extract.data.importers.importing import ImportResult as ImportResult
    from agiqa.extract.data.importers.importing import import_data_set as import_data_set
    from agiqa.extract.data.importers.sets import IMPORTERS as IMPORTERS
    from agiqa.extract.data.items import DataSet as DataSet
    from agiqa.extract.data.items import Item as Item
    from agiqa.extract.data.items import Message as Message
    from agiqa.extract.describing.asking import Describer as Describer
    from agiqa.extract.describing.describing import DescriptionResult as DescriptionResult
    from agiqa.extract.describing.describing import run_descriptions as run_descriptions
    from agiqa.extract.describing.rounds import Described as Described
    from agiqa.extract.describing.rounds import DescriptionSettings as DescriptionSettings
    from agiqa.extract.describing.served import run_served_descriptions as run_served_descriptions
    from agiqa.extract.filling.extraction import extract as extract
    from agiqa.extract.filling.job import ExtractionResult as ExtractionResult
    from agiqa.extract.filling.job import run_extraction as run_extraction
    from agiqa.extract.filling.one_pass import StoredDescriptions as StoredDescriptions
    from agiqa.extract.filling.one_pass import run_stored_descriptions as run_stored_descriptions
    from agiqa.extract.filling.plan import LengthRule as LengthRule
    from agiqa.extract.filling.settings import ExtractionSettings as ExtractionSettings
    from agiqa.extract.models.contract import Backbone as Backbone
    from agiqa.extract.models.contract import GenerationSettings as GenerationSettings
    from agiqa.extract.models.contract import Prepared as Prepared
    from agiqa.extract.models.huggingface import HuggingFaceBackbone as HuggingFaceBackbone
    from agiqa.extract.models.merging import MergeResult as MergeResult
    from agiqa.extract.models.merging import merge_adapter as merge_adapter
    from agiqa.extract.models.opening import BACKBONES as BACKBONES
    from agiqa.extract.models.opening import open_backbone as open_backbone
    from agiqa.extract.teaching.apis import api_of as api_of
    from agiqa.extract.teaching.batch_steps import BatchSettings as BatchSettings
    from agiqa.extract.teaching.batches import run_batches as run_batches
    from agiqa.extract.teaching.client import Client as Client
    from agiqa.extract.teaching.client import ClientSettings as ClientSettings
    from agiqa.extract.teaching.client import key_for as key_for
    from agiqa.extract.teaching.job import Splits as Splits
    from agiqa.extract.teaching.job import TeachingResult as TeachingResult
    from agiqa.extract.teaching.job import TeachingSettings as TeachingSettings
    from agiqa.extract.teaching.questions import QuestionSettings as QuestionSettings
    from agiqa.extract.teaching.teacher import TeacherModel as TeacherModel
    from agiqa.extract.teaching.teaching import run_teaching as run_teaching
    from agiqa.extract.tuning.recipes import Recipe as Recipe
    from agiqa.extract.tuning.recipes import recipe_of as recipe_of
    from agiqa.extract.tuning.tuning import TuningPlan as TuningPlan
    from agiqa.extract.tuning.tuning import TuningResult as TuningResult
    from agiqa.extract.tuning.tuning import TuningSettings as TuningSettings
    from agiqa.extract.tuning.tuning import plan_tuning as plan_tuning
    from agiqa.extract.tuning.tuning import run_tuning as run_tuning

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "data.datasets": ["load_data_set"],
        "data.importers.contract": ["PublishedSet"],
        "data.importers.importing": ["ImportResult", "import_data_set"],
        "data.importers.sets": ["IMPORTERS"],
        "data.items": ["DataSet", "Item", "Message"],
        "describing.asking": ["Describer"],
        "describing.rounds": ["Described", "DescriptionSettings"],
        "describing.describing": ["DescriptionResult", "run_descriptions"],
        "describing.served": ["run_served_descriptions"],
        "filling.extraction": ["extract"],
        "filling.job": ["ExtractionResult", "run_extraction"],
        "filling.one_pass": ["StoredDescriptions", "run_stored_descriptions"],
        "filling.plan": ["LengthRule"],
        "filling.settings": ["ExtractionSettings"],
        "models.contract": ["Backbone", "GenerationSettings", "Prepared"],
        "models.huggingface": ["HuggingFaceBackbone"],
        "models.merging": ["MergeResult", "merge_adapter"],
        "models.opening": ["BACKBONES", "open_backbone"],
        "teaching.apis": ["api_of"],
        "teaching.teacher": ["TeacherModel"],
        "teaching.batch_steps": ["BatchSettings"],
        "teaching.batches": ["run_batches"],
        "teaching.client": ["Client", "ClientSettings", "key_for"],
        "teaching.job": ["Splits", "TeachingResult", "TeachingSettings"],
        "teaching.questions": ["QuestionSettings"],
        "teaching.teaching": ["run_teaching"],
        "tuning.recipes": ["Recipe", "recipe_of"],
        "tuning.tuning": ["TuningPlan", "TuningResult", "TuningSettings", "plan_tuning", "run_tuning"],
    },
)


class _Callable(ModuleType):
    """This package, whose call is that of `extract`: Python names package and function `agiqa.extract` alike."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """As `agiqa.extract.extract`."""
        return self.extract(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
