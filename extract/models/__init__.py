"""Backbones: frozen models that turn a conversation (and an image) into final hidden states.

`open_backbone` chooses the backbone for a checkpoint. Model code is imported only when it is used.
"""

from typing import TYPE_CHECKING

from agiqa.lazy import lazy_names

if TYPE_CHECKING:
    from agiqa.extract.models.contract import Answer as Answer
    from agiqa.extract.models.contract import AnsweringModel as AnsweringModel
    from agiqa.extract.models.contract import Backbone as Backbone
    from agiqa.extract.models.contract import GenerationSettings as GenerationSettings
    from agiqa.extract.models.contract import Prepared as Prepared
    from agiqa.extract.models.opening import open_backbone as open_backbone

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "contract": ["Answer", "AnsweringModel", "Backbone", "GenerationSettings", "Prepared"],
        "opening": ["open_backbone"],
    },
)
