"""Questions asked of the other rooms: demo, ablations, transfers, reports. LOG.md beside this file is the lab log."""

from agiqa.bench.demo import DemoResult, run_demo
from agiqa.bench.pictures import Panel, scatter

__all__ = ["DemoResult", "Panel", "run_demo", "scatter"]
