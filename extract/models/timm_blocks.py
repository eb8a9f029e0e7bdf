"""The blocks within the stages of a convolutional network of timm, of which `feature_info` lists the stages alone.

A stage is an `nn.Sequential` of blocks, or has one called `blocks`. Stages lie beside those that `feature_info` lists,
which are only the last ones of each resolution: EfficientNet-Lite0 lists 5 of its 7, and has 16 blocks.
"""

from typing import Any

from torch import nn


def blocks_of(model: Any) -> list[str]:
    """The names of the modules that are blocks, in the order in which they run; none where stages are not known.

    Single layers are no blocks: the next one may change their output in place.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    found: list[str] = []
    for stage in _stages(model, modules):
        inner = stage if type(modules[stage]) is nn.Sequential else _joined(stage, "blocks")
        found += [_joined(inner, name) for name, _ in modules[inner].named_children()]
    return [] if any(not list(modules[name].children()) for name in found) else found


def _stages(model: Any, modules: dict[str, nn.Module]) -> list[str]:
    """All children of the container of the listed stages; of the model itself, those from the first to the last one."""
    infos = getattr(model, "feature_info", [])
    listed = [str(info["module"]) for info in infos if _holds_blocks(modules.get(str(info["module"])))]
    if not listed:
        return []
    parent = listed[0].rpartition(".")[0]
    beside = [_joined(parent, name) for name, module in modules[parent].named_children() if _holds_blocks(module)]
    if not set(listed) <= set(beside):
        return []
    return beside if parent else beside[beside.index(listed[0]) : beside.index(listed[-1]) + 1]


def _holds_blocks(module: nn.Module | None) -> bool:
    """`SequentialList`, as of HRNet, is another class: its blocks return several maps."""
    return type(module) is nn.Sequential or type(getattr(module, "blocks", None)) is nn.Sequential


def _joined(parent: str, child: str) -> str:
    return f"{parent}.{child}" if parent else child
