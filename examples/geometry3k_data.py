"""Geometry3K as files for `foveate rollout` and `foveate train`, with a tiny random model to try them on.

    python examples/geometry3k_data.py PATH [--limit 20] [--out runs/geometry3k]

PATH is a `problems.jsonl` of Geometry3K, whose diagrams are drawn from their annotations, or a folder of its problems
as JSON and PNG files. Writes under --out: data.jsonl, one problem a line with its answer and the facts its diagram
shows; images/; and model/, a Qwen2.5-VL of random weights with tokenizer and image processor. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from geometry3k_problems import INSTRUCTION, Problem, load_problems

from foveate.rollout.testing import tiny_model, tiny_processor


def write_problems(problems: Sequence[Problem], folder: Path) -> Path:
    """Writes each problem as a line and its diagram as a picture, and returns the file."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    path = folder / "data.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for problem in problems:
            image = f"images/{problem.id}.png"
            problem.diagram.save(folder / image)
            facts = [[fact.subject, fact.value] for fact in problem.facts]
            line = {"id": problem.id, "prompt": f"{problem.question} {INSTRUCTION}", "images": [image]}
            file.write(json.dumps({**line, "answer": problem.answer, "facts": facts}, ensure_ascii=False) + "\n")
    return path


def write_model(folder: Path) -> Path:
    """Writes a tiny random Qwen2.5-VL that `--model` takes, and returns its folder."""
    processor = tiny_processor()
    for part in (tiny_model("qwen2_5_vl"), processor.tokenizer, processor.image_processor):
        part.save_pretrained(folder / "model")
    return folder / "model"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("path", type=Path, metavar="PATH", help="problems.jsonl or a folder of JSON and PNG files")
    parser.add_argument("--limit", type=int, default=20, help="number of problems")
    parser.add_argument("--out", type=Path, default=Path("runs/geometry3k"), help="folder to write to")
    options = parser.parse_args(arguments)
    problems = load_problems(options.path, options.limit)
    print(f"{len(problems)} problems: {write_problems(problems, options.out)}")
    print(f"model: {write_model(options.out)}")


if __name__ == "__main__":
    main()
