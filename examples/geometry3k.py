"""Real geometry problems: diagrams in, groups of rollouts out, scored against what each diagram shows.

    python examples/geometry3k.py PATH [--limit 4] [--n 4] [--model MODEL] [--out geometry3k.png]

PATH is a `problems.jsonl` of Geometry3K, whose diagrams are drawn from their annotations, or a folder of its
problems as JSON and PNG files. Without --model a tiny random Qwen2.5-VL answers, which shows the machinery and
scores 0. The row "facts" of each problem is a reply that states the diagram's facts: what a model that sees
everything would score. Data: Inter-GPS (Lu et al., ACL 2021, arXiv 2105.04165), MIT licence.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from geometry3k_problems import INSTRUCTION, Problem, load_problems
from PIL import Image, ImageDraw, ImageFont
from rich import box
from rich.console import Console
from rich.table import Table

from foveate import Engine, Request, Rollout, RolloutGroup, SamplingParams
from foveate.rollout.rewards import (
    Fact,
    GeometryGrammar,
    RewardTable,
    RuleJudge,
    WeightedReward,
    describe,
    perception_r1,
)

PARTS = ("accuracy", "format", "perception", "repetition")


def make_request(problem: Problem, n: int, max_tokens: int) -> Request:
    """One group: the diagram, the question, and in the metadata what the rewards compare with."""
    content = [{"type": "image"}, {"type": "text", "text": f"{problem.question} {INSTRUCTION}"}]
    metadata = {"answer": problem.answer, "facts": problem.facts}
    return Request(
        [{"role": "user", "content": content}],
        images=(problem.diagram,),
        n=n,
        sampling=SamplingParams(max_tokens=max_tokens, seed=problem.id),
        metadata=metadata,
    )


def reply_with(facts: Sequence[Fact], answer: str | None) -> str:
    """A reply in the asked format that states these facts and this answer."""
    return f"<think>\n{chr(10).join(map(describe, facts))}\n</think>\n<answer>\\boxed{{{answer or '?'}}}</answer>"


def with_reply(group: RolloutGroup, text: str) -> RolloutGroup:
    """The group with this text as its only rollout, so that the same reward scores it."""
    first: Rollout = dataclasses.replace(group.rollouts[0], text=text, finish_reason="stop")
    return dataclasses.replace(group, rollouts=(first,))


def geometry_reward() -> WeightedReward:
    """Perception-R1's reward with a judge that reads statements about geometry only."""
    return perception_r1(RuleJudge([GeometryGrammar()]))


def score_table(problems: Sequence[Problem], groups: Sequence[RolloutGroup], reward: WeightedReward) -> Table:
    """The reward of every rollout, part by part; "-" is unscorable, such as accuracy without a known answer."""
    table = Table(title="Perception-R1 reward on Geometry3K", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("no.", "facts", "reply", *PARTS, "total", "ended"):
        table.add_column(column, justify="left" if column in ("reply", "ended") else "right")
    for problem, group in zip(problems, groups, strict=True):
        scores = reward(group)
        for i, rollout in enumerate(group.rollouts):
            head = (str(problem.id), str(len(problem.facts))) if i == 0 else ("", "")
            ended = str(group.error) if group.error is not None else rollout.finish_reason
            table.add_row(*head, str(i), *_cells(scores, i), ended)
        ideal = reward(with_reply(group, reply_with(problem.facts, problem.answer)))
        table.add_row("", "", "facts", *_cells(ideal, 0), "", style="green", end_section=True)
    return table


def _cells(scores: RewardTable, index: int) -> list[str]:
    values = [scores.parts[name][index] for name in PARTS] + [scores.totals[index]]
    return ["-" if value is None else f"{value:.2f}" for value in values]


def contact_sheet(problems: Sequence[Problem], columns: int = 4, side: int = 320) -> Image.Image:
    """All diagrams on one page, each with its problem number."""
    rows = -(-len(problems) // columns)
    page = Image.new("RGB", (min(columns, len(problems)) * side, rows * side), (225, 225, 228))
    pen = ImageDraw.Draw(page)
    for i, problem in enumerate(problems):
        x, y = i % columns * side, i // columns * side
        pen.rectangle((x + 4, y + 4, x + side - 5, y + side - 5), fill="white")
        picture = problem.diagram.copy()
        picture.thumbnail((side - 20, side - 44), Image.Resampling.LANCZOS)
        page.paste(picture, (x + (side - picture.width) // 2, y + 32 + (side - 40 - picture.height) // 2))
        pen.text((x + 14, y + 12), f"problem {problem.id}", font=ImageFont.load_default(15), fill=(90, 90, 95))
    return page


def make_engine(model: str | None) -> Engine:
    """An engine over a saved vision-language model, or over a tiny random one."""
    if model is not None:
        return Engine.from_pretrained(model)
    from foveate.rollout.testing import tiny_model, tiny_processor

    return Engine(tiny_model("qwen2_5_vl"), tiny_processor())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("path", type=Path, metavar="PATH", help="problems.jsonl or a folder of JSON and PNG files")
    parser.add_argument("--limit", type=int, default=4, help="number of problems")
    parser.add_argument("--n", type=int, default=4, help="rollouts of each problem")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--model", help="folder or name of a saved Qwen2.5-VL")
    parser.add_argument("--out", type=Path, default=Path("geometry3k.png"), help="page with all diagrams")
    options = parser.parse_args(arguments)

    problems = load_problems(options.path, options.limit)
    engine = make_engine(options.model)
    groups = engine.generate([make_request(problem, options.n, options.max_tokens) for problem in problems])

    console = Console()
    console.print(score_table(problems, groups, geometry_reward()))
    unread = sum(len(problem.unread) for problem in problems)
    read = sum(len(problem.facts) for problem in problems)
    console.print(
        f"{read} diagram facts to be seen; {unread} have no statement in the judge's grammar and are left out"
    )
    contact_sheet(problems).save(options.out)
    console.print(f"diagrams: {options.out}")


if __name__ == "__main__":
    main()
