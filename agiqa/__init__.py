"""agiqa: extract the features of a multimodal LLM once, train MOS heads from them in minutes.

Its rooms (sub-packages), in the order of the data flow: `agiqa.extract` (phase 1), `agiqa.store` (the feature store),
`agiqa.heads` (phase 2), `agiqa.bench` (experiments and benchmarks with the other three).
"""

from agiqa.version import agiqa_version

__all__ = ["__version__"]

__version__ = agiqa_version()
