"""Questions asked of the other rooms: demo, ablations, transfers, reports. LOG.md beside this file is the lab log.

Public names are loaded when they are asked for: each question needs other libraries, and none needs all of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agiqa.bench.demo.run import DemoResult, run_demo
    from agiqa.bench.report.pictures import Panel, scatter

__all__ = ["DemoResult", "Panel", "run_demo", "scatter"]

_MODULES = {"DemoResult": "demo.run", "Panel": "report.pictures", "run_demo": "demo.run", "scatter": "report.pictures"}


def __getattr__(name: str) -> object:
    """A public name, from its module."""
    if name not in _MODULES:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
