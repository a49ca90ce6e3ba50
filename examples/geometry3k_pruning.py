"""What pruning keeps of Geometry3K diagrams: how many of the points, and of the patches with ink, survive.

    python examples/geometry3k_pruning.py PATH [--limit 20] [--keep 0.5 0.25 0.125] [--model MODEL] [--seeds 5]

PATH is a folder of problems with their original diagrams or a `problems.jsonl`, whose diagrams are drawn. A point
counts as kept if the patch under it is. Without --model every seed is a tiny Qwen2.5-VL with random weights of its own:
what its attention selects says nothing of a trained model. With --model only `random` depends on the seed. The sheet
shows the first problems, with what is kept at the first share.
Data: Inter-GPS (Lu et al., ACL 2021, arXiv 2105.04165), MIT licence.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from geometry3k import make_request
from geometry3k_problems import Problem, load_problems
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table

from foveate import Engine, EngineConfig, PruneConfig
from foveate.rollout.testing import tiny_model, tiny_processor
from foveate.rollout.tools.prune_view import draw, kept_patches, sites_of, with_pruning

METHODS = ("random", "strided", "visionzip", "divprune", "fastv", "pyramiddrop")
SIDE = 28  # pixels of a patch as the language model gets it
DARK = 200  # of 255; a patch with a darker pixel has ink
SHOWN = 4  # problems on the sheet
KV_MEMORY = 1 << 24  # bytes, of a tiny model
Shares = dict[tuple[str, str, float], list[float]]  # (what, method, keep) -> its value for each seed


def config_for(method: str, keep: float, seed: int) -> PruneConfig:
    """The method with its defaults, except that pyramiddrop's last stage leaves `keep`."""
    if method == "pyramiddrop":
        return PruneConfig(method, keep, ratios=(keep ** (1 / 3), keep ** (2 / 3), keep))
    return PruneConfig(method, keep, seed=seed if method == "random" else None)


def kept_masks(engine: Engine, problems: Sequence[Problem]) -> list[np.ndarray]:
    """bool [rows, columns] of merged tokens for each problem: what is left after the last site."""
    groups = engine.generate([make_request(problem, 1, 1) for problem in problems], strict=True, progress=False)
    return [kept_patches(group, sites_of(group)[-1], 0).numpy() > 0 for group in groups]


def point_cells(problem: Problem, rows: int, columns: int) -> list[tuple[int, int]]:
    """The patch under each point."""
    width, height = problem.diagram.size
    cells = ((int(y * rows / height), int(x * columns / width)) for x, y in problem.points.values())
    return [(min(max(row, 0), rows - 1), min(max(column, 0), columns - 1)) for row, column in cells]


def ink_cells(problem: Problem, rows: int, columns: int) -> np.ndarray:
    """bool [rows, columns]: patches with a dark pixel."""
    picture = problem.diagram.convert("L").resize((columns * SIDE, rows * SIDE), Image.Resampling.BICUBIC)
    return (np.asarray(picture) < DARK).reshape(rows, SIDE, columns, SIDE).any(axis=(1, 3))


def shares(problems: Sequence[Problem], masks: Sequence[np.ndarray]) -> dict[str, float]:
    """Share of all points and of all patches with ink that is kept."""
    pairs = list(zip(problems, masks, strict=True))
    points = [mask[cell] for problem, mask in pairs for cell in point_cells(problem, *mask.shape)]
    ink = np.concatenate([mask[ink_cells(problem, *mask.shape)] for problem, mask in pairs])
    return {"points": float(np.mean(points)), "ink": float(ink.mean())}


def measure(engines: Sequence[Engine], problems: Sequence[Problem], keeps: Sequence[float]) -> Shares:
    """Every method and share with every engine; the n-th is of seed n."""
    found: Shares = {}
    for seed, engine in enumerate(engines):
        for method in METHODS:
            for keep in keeps:
                masks = kept_masks(with_pruning(engine, config_for(method, keep, seed)), problems)
                for what, value in shares(problems, masks).items():
                    found.setdefault((what, method, keep), []).append(value)
    return found


def share_table(found: Shares, keeps: Sequence[float], title: str) -> Table:
    """A row for each method: the mean over the seeds in percent, with its standard error where seeds differ."""
    table = Table(title=title, box=box.MARKDOWN)
    table.add_column("method")
    for what in ("points", "ink"):
        for keep in keeps:
            table.add_column(f"{what} at {keep:g}", justify="right")
    table.add_row("random, expected", *(f"{100 * keep:.1f}" for _ in range(2) for keep in keeps))
    for method in METHODS:
        table.add_row(method, *(_cell(found[what, method, keep]) for what in ("points", "ink") for keep in keeps))
    return table


def caption(engine: Engine, problems: Sequence[Problem]) -> str:
    """How many diagrams, points and patches the table is about."""
    masks = kept_masks(with_pruning(engine, config_for("strided", 1.0, 0)), problems)
    ink = [ink_cells(problem, *mask.shape) for problem, mask in zip(problems, masks, strict=True)]
    patches, inked = sum(cells.size for cells in ink), sum(int(cells.sum()) for cells in ink)
    points = sum(len(problem.points) for problem in problems)
    return f"percent kept in {len(problems)} diagrams: {points} points; {inked} of {patches} patches have ink"


def _cell(values: Sequence[float]) -> str:
    if max(values) == min(values):
        return f"{100 * values[0]:.1f}"
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{100 * statistics.mean(values):.1f} ± {100 * error:.1f}"


def overlays(engine: Engine, problems: Sequence[Problem], keep: float) -> Image.Image:
    """One row of pictures for each problem: the diagram, and what each method keeps of it."""
    configs = [config_for(method, keep, 0) for method in METHODS]
    rows = [draw(engine, [problem.diagram], problem.question, configs) for problem in problems]
    sheet = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)))
    for index, row in enumerate(rows):
        sheet.paste(row, (0, sum(above.height for above in rows[:index])))
    return sheet


def make_engines(model: str | None, seeds: int) -> list[Engine]:
    """An engine for each seed: over the saved model, or over a tiny random one of that seed."""
    if model is not None:
        return [Engine.from_pretrained(model)] * seeds
    models = [tiny_model("qwen2_5_vl", seed=seed, num_hidden_layers=4) for seed in range(seeds)]
    return [Engine(model, tiny_processor(), EngineConfig(kv_memory=KV_MEMORY)) for model in models]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("path", type=Path, metavar="PATH", help="problems.jsonl or a folder of JSON and PNG files")
    parser.add_argument("--limit", type=int, default=20, help="number of problems")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25, 0.125], help="shares of the patches")
    parser.add_argument("--model", help="folder or name of a saved Qwen2.5-VL")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("geometry3k_pruning.png"), help="sheet of the first problems")
    options = parser.parse_args(arguments)

    problems = load_problems(options.path, options.limit)
    problems = [problem for problem in problems if problem.points]
    engines = make_engines(options.model, options.seeds)
    found = measure(engines, problems, options.keep)
    Console().print(share_table(found, options.keep, caption(engines[0], problems)))
    overlays(engines[0], problems[:SHOWN], options.keep[0]).save(options.out)
    print(f"kept patches of the first {min(SHOWN, len(problems))}: {options.out}")


if __name__ == "__main__":
    main()
