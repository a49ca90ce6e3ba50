"""`foveate doctor --plan`: what one training step holds in memory, on which GPU it fits, and how fast it can be."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Sequence
from dataclasses import fields, replace
from importlib.util import find_spec

from foveate.rollout.tools.plan import GIB, GPU, GPUS, RESERVE, Workload, memory, times
from foveate.rollout.tools.sizes import SHAPES, Sizes, sizes_of

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
Table = tuple[str, list[str], list[list[str]]]  # title, heads of the columns, rows


def main(arguments: Sequence[str]) -> int:
    """Prints the plan; returns 0, or 2 after an error in the options, which is printed."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        sizes, work = sizes_of(options.model), _workload(options)
    except ValueError as error:
        parser.error(str(error))
    gpus = _gpus(options)
    if options.json:
        print(json.dumps(_as_json(options.model, sizes, work, gpus)))
        return 0
    tables = [_memory_table(options.model, sizes, work), *_gpu_tables(sizes, work, gpus)]
    show = _print_rich if find_spec("rich") else _print_plain
    for table in tables:
        show(*table)
    print(f"Times are rooflines: nothing is faster. {RESERVE:.0%} of a GPU's memory is left free.")
    return 0


def _memory_table(name: str, sizes: Sizes, work: Workload) -> Table:
    kinds = [replace(work, checkpointing=on) for on in (True, False)]
    columns = [memory(sizes, kind) for kind in kinds]
    rows = [[part, *(f"{held[part] / GIB:.2f}" for held in columns)] for part in columns[0]]
    rows.append(["together", *(f"{sum(held.values()) / GIB:.2f}" for held in columns)])
    samples = f"{work.prompts} prompts of {work.prompt} tokens x {work.n} completions of {work.completion}"
    return f"{name}, {sizes.parameters / 1e9:.2f}e9 parameters, {samples}: GiB", ["", "checkpointing", "without"], rows


def _gpu_tables(sizes: Sizes, work: Workload, gpus: dict[str, GPU]) -> list[Table]:
    fits, seconds = [], []
    phases = list(times(sizes, work, next(iter(gpus.values()))))
    for name, gpu in gpus.items():
        source = "measured" if gpu.measured else "vendor's figures"
        room = gpu.memory * (1 - RESERVE)
        words = [_verdict(room, replace(work, checkpointing=on), sizes) for on in (True, False)]
        fits.append([name, f"{gpu.memory / GIB:.0f}", *words])
        found = times(sizes, work, gpu)
        seconds.append([name, *(f"{found[phase]:.2f}" for phase in phases), f"{sum(found.values()):.2f}", source])
    return [
        ("does it fit?", ["", "GiB", "checkpointing", "without"], fits),
        ("seconds a step, at the roofline", ["", *phases, "together", "bandwidth, rate"], seconds),
    ]


def _verdict(room: float, work: Workload, sizes: Sizes) -> str:
    over = sum(memory(sizes, work).values()) - room
    return f"fits, {-over / GIB:.1f} left" if over <= 0 else f"does not fit, {over / GIB:.1f} over"


def _as_json(name: str, sizes: Sizes, work: Workload, gpus: dict[str, GPU]) -> dict:
    held = memory(sizes, work)
    found = {
        key: {"fits": sum(held.values()) <= gpu.memory * (1 - RESERVE), "seconds": times(sizes, work, gpu)}
        for key, gpu in gpus.items()
    }
    return {"model": name, "parameters": sizes.parameters, "bytes": held, "gpus": found}


def _workload(options: argparse.Namespace) -> Workload:
    own = {field.name: getattr(options, field.name) for field in fields(Workload) if hasattr(options, field.name)}
    return Workload(**own, itemsize=ITEMSIZE[options.dtype])


def _gpus(options: argparse.Namespace) -> dict[str, GPU]:
    own = options.gpu_memory, options.gpu_bandwidth, options.gpu_rate
    if all(value is None for value in own):
        return dict(GPUS)
    if any(value is None for value in own):
        _parser().error("expected --gpu-memory, --gpu-bandwidth and --gpu-rate together")
    return {**GPUS, "yours": GPU(int(own[0] * GIB), own[1] * 1e12, own[2] * 1e12, measured=True)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="foveate doctor --plan", description=__doc__)
    parser.add_argument("--model", default="Qwen2.5-VL-3B", help=f"{', '.join(SHAPES)}, or a folder with a config.json")
    parser.add_argument("--dtype", default="bfloat16", choices=ITEMSIZE)
    words = {
        "prompts": "groups of a step",
        "n": "samples of a group",
        "prompt": "tokens of a prompt, those of images included",
        "images": "of a prompt",
        "patches": "of an image",
        "completion": "tokens",
        "micro_batch": "tokens of one forward of the update",
        "page": "tokens of a KV page",
        "sequences": "samples that decode at a time",
        "prefill": "tokens of a prefill step",
    }
    defaults = Workload()
    for name, text in words.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=getattr(defaults, name), help=f"{text} (%(default)s)")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True, help="of the times")
    parser.add_argument("--grouped", action=argparse.BooleanOptionalAction, default=True, help="prompts once a group")
    parser.add_argument(
        "--optimizer", action=argparse.BooleanOptionalAction, default=True, help="without: rollouts alone"
    )
    parser.add_argument("--reference", action="store_true", help="a frozen copy for the KL penalty")
    parser.add_argument("--gpu-memory", type=float, help="GiB, of a GPU of your own")
    parser.add_argument("--gpu-bandwidth", type=float, help="TB/s")
    parser.add_argument("--gpu-rate", type=float, help="TFLOP/s of bfloat16")
    parser.add_argument("--json", action="store_true", help="one JSON object, for programs")
    return parser


def _print_rich(title: str, heads: list[str], rows: list[list[str]]) -> None:
    kind = importlib.import_module("rich.table").Table(title=title, title_justify="left")
    for index, head in enumerate(heads):
        kind.add_column(head, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        kind.add_row(*row)
    importlib.import_module("rich.console").Console(width=120).print(kind)


def _print_plain(title: str, heads: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[index]) for row in [heads, *rows]) for index in range(len(heads))]
    print(f"\n{title}")
    for row in [heads, *rows]:
        first, *others = (
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([first, *others]).rstrip())
