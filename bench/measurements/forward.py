"""Where the forward pass of an extraction spends its time: `python -m agiqa.bench.measurements.forward --help`.

Times the language model, and vision tower with resampler, on made-up batches of the real size: as transformers runs
them, packed, and compiled, with each layout of the weights. It also times attention by each kernel of torch, and the
matrix products alone, which are the floor. `--profile` adds the kernels that take longest. The weights are random.
"""

import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention

from agiqa.bench.measurements.measuring import Line, device_name, digits, joined, print_tables, result_options
from agiqa.bench.measurements.random_models import SHAPES
from agiqa.bench.recording.tables import as_table
from agiqa.extract.models.attention import Bounds, attention
from agiqa.extract.models.compiling import compile_layers, layers_of
from agiqa.extract.models.minicpm.backbone import MiniCPMBackbone
from agiqa.extract.models.minicpm.packed import PackedForm, PackedMiniCPM
from agiqa.progress import say
from agiqa.store.format.layers import LAST

PARTS = ("text", "vision", "attention", "products")
FORMS = {
    "as used": PackedForm(),
    "own widths": PackedForm(mlp_multiple=1, fused_gelu=False),
    "heads of 80": PackedForm(head_width=80),
    "MLP of 4304": PackedForm(mlp_multiple=1),
    "GELU after the product": PackedForm(fused_gelu=False),
}
_SLICES = np.array([[32, 32], [23, 45], [23, 45]])
"""Rows and columns of patches of a 512 x 512 image, cut at a resolution of 448."""
_KERNELS = {
    "torch's choice": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_SHOWN = 14
"""Kernels of a profile."""


class Timing:
    """Times calls on one device."""

    def __init__(self, device: torch.device, *, repeats: int, profile: bool) -> None:
        """`repeats` is the number of timed calls."""
        self.device, self._repeats, self._profile = device, repeats, profile

    def __call__(self, run: Callable[[], Any]) -> tuple[float, float]:
        """Seconds of the first call, and the mean of later ones."""
        with torch.inference_mode():
            first = self._seconds(run)
            run()
            return first, self._seconds(lambda: [run() for _ in range(self._repeats)]) / self._repeats

    def show_kernels(self, run: Callable[[], Any], title: str) -> None:
        """Print the kernels of one call that take longest, if profiles are wanted."""
        if not self._profile or self.device.type != "cuda":
            return
        from torch.profiler import ProfilerActivity, profile

        with torch.inference_mode(), profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
            run()
            torch.cuda.synchronize(self.device)
        events = [event for event in recorded.key_averages() if event.self_device_time_total > 0]
        kernels = [event for event in events if str(event.device_type).endswith("CUDA")]
        total = sum(event.self_device_time_total for event in kernels)
        say(f"{title}: {total / 1e3:.2f} ms in kernels")
        for event in sorted(kernels, key=lambda event: -event.self_device_time_total)[:_SHOWN]:
            say(f"  {event.self_device_time_total / 1e3:8.2f} ms {event.count:5d} x {event.key[:110]}")

    def _seconds(self, run: Callable[[], Any]) -> float:
        self._wait()
        started = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextmanager
def compiled_layers(model: nn.Module) -> Generator[None]:
    """The layers of `model` are compiled while inside."""
    compile_layers(model)
    try:
        yield
    finally:
        for _, layer in layers_of(model):
            del layer.forward  # that of the class is there again


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def text_lines(backbone: MiniCPMBackbone, timing: Timing, size: int) -> Iterator[Line]:
    """The language model on `size` conversations of 431 to 527 tokens, as units of a store hold them."""
    model = backbone.loaded()
    random = np.random.default_rng(size)
    lengths = np.sort(random.integers(431, 528, size))
    generator = torch.Generator(timing.device).manual_seed(0)
    shape = (int(lengths.sum()), backbone.hidden_size)
    packed_inputs = torch.randn(shape, generator=generator, device=timing.device).to(model.llm.lm_head.weight.dtype)
    padded = nn.utils.rnn.pad_sequence(list(packed_inputs.split(lengths.tolist())), batch_first=True)

    def plain() -> Tensor:
        states: Tensor = model.llm.model(inputs_embeds=padded, use_cache=False).last_hidden_state
        return torch.cat([row[:length] for row, length in zip(states, lengths.tolist(), strict=True)])

    def line(name: str, run: Callable[[], Tensor], expected: Tensor | None = None) -> Line:
        first, seconds = timing(run)
        with torch.inference_mode():
            error = 0.0 if expected is None else _difference(run(), expected)
        timing.show_kernels(run, f"text, {name}, batch {size}")
        return _line("text", name, size, seconds, first=first, difference=error)

    yield line("transformers", plain)
    with torch.inference_mode():
        expected = plain()
    packed = PackedMiniCPM(model)

    def run() -> Tensor:
        return packed.states(packed_inputs, lengths)[LAST]

    yield line("packed", run, expected)
    if timing.device.type == "cuda":  # for a CPU it takes minutes
        with compiled_layers(model.llm):
            yield line("transformers, compiled layers", plain, expected)
        packed.compile()
        yield line("packed, compiled", run, expected)


def vision_lines(backbone: MiniCPMBackbone, timing: Timing, size: int) -> Iterator[Line]:
    """Vision tower and resampler on the slices of `size` images of 512 x 512."""
    model = backbone.loaded()
    sizes = np.tile(_SLICES, (size, 1))
    attended = np.full(len(sizes), _SLICES.prod(axis=1).max())
    count = int(sizes.prod(axis=1).sum())
    patches = torch.randint(0, 256, (count, 3 * 14 * 14), dtype=torch.uint8, device=timing.device)

    def line(name: str, run: Callable[[], Tensor], expected: Tensor | None = None, *, shown: bool = False) -> Line:
        first, seconds = timing(run)
        with torch.inference_mode():
            error = 0.0 if expected is None else _difference(run(), expected)
        if shown:
            timing.show_kernels(run, f"vision, {name}, batch {size}")
        return _line("vision", name, size, seconds, first=first, difference=error)

    def plain() -> Tensor:
        tokens: Tensor = model.image_tokens(patches, sizes, attended)
        return tokens

    yield line("transformers", plain, shown=True)
    with torch.inference_mode():
        expected = plain()
    for name, form in FORMS.items():
        packed = PackedMiniCPM(model, form)
        run = partial(packed.image_tokens, patches, sizes, attended)
        yield line(f"packed, {name}", run, expected, shown=name == "as used")


def attention_lines(timing: Timing, size: int) -> Iterator[Line]:
    """Attention of one layer of the vision tower, and of the language model, by each kernel."""
    on, dtype = timing.device, torch.bfloat16 if timing.device.type == "cuda" else torch.float32
    slices, patches = 3 * size, 1035
    for width, (name, backend) in product((72, 80, 96, 128), _KERNELS.items()):
        joint = torch.randn(slices * patches, 3, 16, width, device=on, dtype=dtype)
        query, key, value = (one.unflatten(0, (slices, patches)).transpose(1, 2) for one in joint.unbind(1))
        run: Callable[[], Tensor] = partial(scaled_dot_product_attention, query, key, value, scale=72**-0.5)
        yield from _attention_line(timing, f"vision, heads of {width}, {name}", run, backend, size)
    if on.type == "cuda":
        for width in (72, 80, 96, 128):
            query, key, value = torch.randn(slices * patches, 3, 16, width, device=on, dtype=dtype).unbind(1)
            ends = Bounds.of(np.full(slices, patches), on).device
            run = partial(_flash_for_any_lengths, query, key, value, ends, patches)
            yield from _attention_line(timing, f"vision, heads of {width}, flash for any lengths", run, None, size)
    for name, backend in _KERNELS.items():
        query = torch.randn(size, 32, 527, 128, device=on, dtype=dtype)
        key = torch.randn(size, 8, 527, 128, device=on, dtype=dtype)
        run = partial(scaled_dot_product_attention, query, key, key, is_causal=True, enable_gqa=True)
        yield from _attention_line(timing, f"text, padded, {name}", run, backend, size)
    lengths = np.random.default_rng(size).integers(431, 528, size)
    ends_of_text = Bounds.of(lengths, on)
    query = torch.randn(int(lengths.sum()), 32, 128, device=on, dtype=dtype)
    key = torch.randn(int(lengths.sum()), 8, 128, device=on, dtype=dtype)
    run = partial(attention, query, key, key, ends_of_text, ends_of_text, causal=True, scale=128**-0.5)
    yield from _attention_line(timing, "text, packed", run, None, size)


def _flash_for_any_lengths(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int) -> Tensor:
    settings: dict[str, Any] = {"dropout_p": 0.0, "is_causal": False, "return_debug_mask": False, "scale": 72**-0.5}
    found: Any = torch.ops.aten._flash_attention_forward(query, key, value, ends, ends, longest, longest, **settings)
    out: Tensor = found[0]
    return out


def _attention_line(
    timing: Timing, name: str, run: Callable[[], Any], backend: SDPBackend | None, size: int
) -> Iterator[Line]:
    """The line of one kernel; none where it cannot run."""
    try:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            first, seconds = timing(run)
    except RuntimeError as error:
        say(f"attention, {name}: {str(error).splitlines()[0]}")
        return
    yield _line("attention", name, size, seconds, first=first)


def product_lines(backbone: MiniCPMBackbone, timing: Timing, size: int) -> Iterator[Line]:
    """The matrix products of one layer, by themselves."""
    on, dtype = timing.device, torch.bfloat16 if timing.device.type == "cuda" else torch.float32
    width = backbone.hidden_size
    patches, tokens, inner = size * int(_SLICES.prod(axis=1).sum()), size * 479, 14_336
    shapes: list[tuple[str, int, list[tuple[int, int]]]] = [
        ("tower: queries, keys and values apart", patches, [(1152, 1152)] * 3),
        ("tower: queries, keys and values joined", patches, [(1152, 3456)]),
        ("tower: joined, heads of 80", patches, [(1152, 3840)]),
        ("tower: joined, heads of 128", patches, [(1152, 6144)]),
        ("tower: attention output", patches, [(1152, 1152)]),
        *((f"tower: MLP of {wide}, in", patches, [(1152, wide)]) for wide in (4304, 4352, 4608)),
        *((f"tower: MLP of {wide}, out", patches, [(wide, 1152)]) for wide in (4304, 4352, 4608)),
        ("resampler: keys and values", patches, [(1152, width), (width, width), (width, width)]),
        ("text: queries, keys and values apart", tokens, [(width, width), (width, 1024), (width, 1024)]),
        ("text: queries, keys and values joined", tokens, [(width, width + 2048)]),
        ("text: attention output", tokens, [(width, width)]),
        ("text: gate and up apart", tokens, [(width, inner)] * 2),
        ("text: gate and up joined", tokens, [(width, 2 * inner)]),
        ("text: MLP out", tokens, [(inner, width)]),
    ]
    for name, rows, maps in shapes:
        pairs = [
            (torch.randn(rows, i, device=on, dtype=dtype), torch.randn(o, i, device=on, dtype=dtype)) for i, o in maps
        ]
        first, seconds = timing(partial(_products, pairs))
        work = sum(2 * rows * i * o for i, o in maps)
        yield _line("products", name, size, seconds, first=first, tflops=work / seconds / 1e12)
    yield from _gelu_lines(timing, size, patches, dtype)


def _products(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [linear(values, weight) for values, weight in pairs]


def _gelu_lines(timing: Timing, size: int, patches: int, dtype: torch.dtype) -> Iterator[Line]:
    values = torch.randn(patches, 1152, device=timing.device, dtype=dtype)
    weight, bias = (torch.randn(*shape, device=timing.device, dtype=dtype) for shape in ((4304, 1152), (4304,)))
    runs: Mapping[str, Callable[[], Tensor]] = {
        "then GELU": lambda: nn.functional.gelu(linear(values, weight, bias), approximate="tanh"),
        "GELU in the product": lambda: torch.ops.aten._addmm_activation(bias, values, weight.t(), use_gelu=True),
    }
    for name, run in runs.items():
        first, seconds = timing(run)
        yield _line("products", f"tower: MLP of 4304, in, {name}", size, seconds, first=first)


def _line(part: str, name: str, size: int, seconds: float, **measured: float) -> Line:
    config = {"batch_size": size}
    values = {"ms": 1e3 * seconds, "ms_per_image": 1e3 * seconds / size, **measured}
    return {"stage": "forward", "name": f"{part}: {name}", "config": {**config, "part": part}, "measured": values}


def measured_lines(options: Mapping[str, Any]) -> Generator[Line]:
    """All lines that the command line asks for."""
    with tempfile.TemporaryDirectory() as folder:
        backbone = SHAPES[options["model_shape"]](Path(folder) / "model", device=options["device"])
    assert isinstance(backbone, MiniCPMBackbone)  # as all shapes are
    backbone.load()
    timing = Timing(backbone.device, repeats=options["repeats"], profile=options["profile"])
    facts = {"model": options["model_shape"], "device": device_name(backbone.device)}
    for part, size in product(options["parts"].split(","), map(int, options["sizes"].split(","))):
        lines = {
            "text": lambda size=size: text_lines(backbone, timing, size),
            "vision": lambda size=size: vision_lines(backbone, timing, size),
            "attention": lambda size=size: attention_lines(timing, size),
            "products": lambda size=size: product_lines(backbone, timing, size),
        }[part]()
        for line in lines:
            yield {**line, "config": {**line["config"], **facts}}


def tables(lines: Sequence[Line]) -> str:
    """A markdown table per part."""
    return joined(*(_table([line for line in lines if line["config"]["part"] == part]) for part in PARTS))


def _table(lines: Sequence[Line]) -> str:
    keys = [key for key in ("ms_per_image", "ms", "first", "difference", "tflops") if _has(lines, key)]
    titles = {"ms_per_image": "ms per image", "first": "first call, s"}
    rows = [
        [line["name"], str(line["config"]["batch_size"]), *(_cell(line["measured"], key) for key in keys)]
        for line in lines
    ]
    return as_table(["part", "batch size", *(titles.get(key, key) for key in keys)], rows)


def _has(lines: Sequence[Line], key: str) -> bool:
    return any(key in line["measured"] for line in lines)


def _cell(measured: Mapping[str, float], key: str) -> str:
    if key not in measured:
        return ""
    return f"{measured[key]:.2g}" if key == "difference" else digits(measured[key])


def _summary(line: Line) -> str:
    measured = line["measured"]
    return f"{line['name']}, batch {line['config']['batch_size']}: {measured['ms_per_image']:.3f} ms per image"


@click.command()
@click.option("--model-shape", type=click.Choice(list(SHAPES)), default=next(iter(SHAPES)), show_default=True)
@click.option("--parts", default=",".join(PARTS), show_default=True, help="Separated by commas.")
@click.option("--sizes", default="17", show_default=True, help="Images per batch, separated by commas.")
@click.option("--repeats", default=5, show_default=True, help="Timed calls.")
@click.option("--profile", is_flag=True, help="Print the kernels that take longest.")
@click.option("--device", default="auto", show_default=True)
@result_options
def main(*, out: Path | None, table: Path | None, **options: Any) -> None:
    """Time the parts of the forward pass of an extraction, in each variant."""
    print_tables(measured_lines(options), tables, _summary, out=out, table=table)


if __name__ == "__main__":
    main()
