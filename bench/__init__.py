"""Questions asked of the other rooms: demo, ablations, transfers, reports. LOG.md beside this file is the lab log.

Public names are loaded when they are asked for: each question needs other libraries, and none needs all of them.
"""

from typing import TYPE_CHECKING

from agiqa.lazy import lazy_names

if TYPE_CHECKING:
    from agiqa.bench.demo.run import DemoResult as DemoResult
    from agiqa.bench.demo.run import run_demo as run_demo
    from agiqa.bench.report.pictures import Panel as Panel
    from agiqa.bench.report.pictures import scatter as scatter

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "demo.run": ["DemoResult", "run_demo"],
        "report.pictures": ["Panel", "scatter"],
    },
)
