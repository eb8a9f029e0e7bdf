"""`agiqa merge`: a model and its LoRA adapter as one checkpoint, for software that does not load the adapter."""

from pathlib import Path

import click

from agiqa.commands.options import shared_options
from agiqa.commands.output import print_result, table


@click.command("merge")
@click.argument("model")
@click.argument("adapter")
@click.argument("out", type=click.Path(path_type=Path))
@shared_options
def command(model: str, adapter: str, out: Path, *, as_json: bool) -> None:
    """Write MODEL merged with ADAPTER to the new folder OUT, in the layout of MODEL.

    Servers such as vLLM and SGLang do not load adapters that save whole modules (modules_to_save), as those of
    M3-AGIQA and of `agiqa tune`: give them OUT. agiqa itself reads the adapter by --adapter. MODEL and ADAPTER are
    folders or hub ids. MODEL has safetensors files and is not quantised; its tensors keep their names, shapes and
    dtypes. The weights are merged file by file, on the CPU: memory for the adapter and the largest weight file
    suffices. OUT/merge.json records the hashes of both.
    """
    from agiqa.errors import listed
    from agiqa.extract.models.merging import merge_adapter
    from agiqa.progress import say

    result = merge_adapter(model, adapter, out)
    if result.untied:
        say(f"note: {listed(result.untied)} is no longer tied to the embeddings (tie_word_embeddings: false)")
    shown = {"out": str(out), "tensors": result.tensors, "changed": result.changed, "bytes": result.bytes}
    print_result({**shown, "untied": list(result.untied)}, table(shown), as_json=as_json)
