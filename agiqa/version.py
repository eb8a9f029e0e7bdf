"""The version of agiqa, from the metadata of the installed distribution."""

from importlib.metadata import PackageNotFoundError, version


def agiqa_version() -> str:
    """The installed version, or `0+source` when run from a tree that was never installed."""
    try:
        return version("agiqa")
    except PackageNotFoundError:
        return "0+source"
