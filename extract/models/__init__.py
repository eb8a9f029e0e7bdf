"""Backbones: frozen models that turn a conversation (and an image) into final hidden states.

`open_backbone` chooses the backbone for a checkpoint. Model code is imported only when it is used.
"""

from typing import TYPE_CHECKING, Any

from agiqa.extract.models.contract import Answer, Backbone, GenerationSettings, Prepared

if TYPE_CHECKING:
    from agiqa.extract.models.opening import open_backbone

__all__ = ["Answer", "Backbone", "GenerationSettings", "Prepared", "open_backbone"]


def __getattr__(name: str) -> Any:
    """Import `open_backbone`, and transformers with it, on first use."""
    if name == "open_backbone":
        from agiqa.extract.models.opening import open_backbone

        return open_backbone
    message = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(message)
