"""Backbones: frozen models that turn a conversation (and an image) into final hidden states.

`open_backbone` finds the part that fits a checkpoint; importing this package loads no model code before it
is called.
"""

from typing import TYPE_CHECKING, Any

from agiqa.extract.models.contract import Answer, Backbone, GenerationSettings, Prepared

if TYPE_CHECKING:
    from agiqa.extract.models.opening import open_backbone

__all__ = ["Answer", "Backbone", "GenerationSettings", "Prepared", "open_backbone"]


def __getattr__(name: str) -> Any:
    """Import `open_backbone`, and transformers with it, when it is first asked for."""
    if name == "open_backbone":
        from agiqa.extract.models.opening import open_backbone

        return open_backbone
    message = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(message)
