"""The report of a run: one HTML file that loads nothing from anywhere."""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from foveate.rollout.demo.charts import Axis, Series, dumbbell_chart, line_chart, smooth
from foveate.rollout.demo.gallery import keeps, mosaic, showcase
from foveate.rollout.demo.record import Arm, DemoRecord
from foveate.rollout.demo.scenes import QUESTIONS
from foveate.rollout.demo.style import STYLE
from foveate.rollout.demo.tasks import Evaluation
from foveate.rollout.rewards import PERCEPTION_R1_WEIGHTS

COLOURS = ("var(--blue)", "var(--orange)")  # of the arms
PART_COLOURS = {"accuracy": "var(--green)", "perception": "var(--violet)", "format": "var(--grey)"}


def write_report(record: DemoRecord, folder: Path) -> Path:
    """Writes report.html into the folder, whole or not at all, and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.html"
    fresh = folder / f".report-{os.getpid()}.html"
    fresh.write_text(render(record), encoding="utf-8")
    os.replace(fresh, path)
    return path


def render(record: DemoRecord) -> str:
    """The whole page."""
    parts = [_header(record), _curves(record), _all_scenes(record), _pruning(record), _rollouts(record)]
    body = "".join([*parts, _footer(record)])
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>foveate demo: {html.escape(record.arms[0].result)}</title><style>{STYLE}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def _header(record: DemoRecord) -> str:
    arm = record.arms[0]
    before, after, test = arm.before.accuracy, arm.after.accuracy, arm.comparison
    steps = len(arm.metrics)
    prompts = arm.num_prompts(record.prompts_per_step)
    drawn = f"{steps} steps of {record.prompts_per_step} prompts × {record.group_size}"
    if prompts != steps * record.prompts_per_step:
        drawn = f"{steps} steps, {prompts:,} prompts × {record.group_size}: those that teach nothing are replaced"
    tiles = [
        ("first", f"{100 * (after - before):+.1f}", "points of greedy accuracy on scenes of scans never trained on"),
        ("", f"p = {test.p_value:.1g}", f"McNemar's exact test, two-sided: {test.gained} gained, {test.lost} lost"),
        ("", f"{prompts * record.group_size:,}", f"rollouts: {drawn}"),
        ("", f"{record.seconds / 60:.1f} min", f"for everything, seed {record.seed}"),
    ]
    if len(record.arms) > 1:
        other = record.arms[1]
        change = f"{100 * (other.after.accuracy - other.before.accuracy):+.1f}"
        tiles.insert(2, ("", change, f"points {other.name}, from the same warm start"))
    boxes = "".join(
        f'<div class="tile {style}"><div class="value">{html.escape(value)}</div>'
        f'<div class="what">{html.escape(what)}</div></div>'
        for style, value, what in tiles
    )
    headline = f"Held-out accuracy went from <b>{before:.1%}</b> to <b>{after:.1%}</b>"
    if after > before:
        headline = headline.replace("went", "rose") + ", learned from the model’s own rollouts"
    variant = f" Not the demo’s own recipe: {html.escape(record.variant)}." if record.variant else ""
    return (
        f'<header><p class="name">foveate demo</p><h1>{headline}</h1>'
        f'<p class="lead">A Qwen2.5-VL of {record.num_parameters / 1e6:.1f} million parameters looks at one to four '
        "scanned digits, writes down what it sees and where, and answers a question. A short supervised warm start "
        "taught it the format; GRPO with a reward for what it says it sees did the rest, on rollouts that the engine "
        f'drew from the very weights being trained.{variant}</p><div class="tiles">{boxes}</div></header>'
    )


def _curves(record: DemoRecord) -> str:
    figures = [_evaluation_figure(record), _perception_figure(record), _reward_figure(record), _kinds_figure(record)]
    figures += [_entropy_figure(record), _difference_figure(record)]
    return (
        "<section><h2>How it learned</h2><p>Held-out figures are of greedy replies to the same "
        f"{len(record.held_out)} scenes each time; the others are of the sampled rollouts of each step, as a running "
        f'mean over the faint line.</p><div class="charts">{"".join(figures)}</div></section>'
    )


def _figure(title: str, note: str, drawing: str, legend: Sequence[tuple[str, str]] = ()) -> str:
    keys = "".join(f'<span><i style="background:{colour}"></i>{html.escape(name)}</span>' for name, colour in legend)
    return (
        f'<figure><figcaption><h3>{html.escape(title)}</h3><p class="note">{html.escape(note)}</p>'
        f'<div class="legend">{keys}</div></figcaption>{drawing}</figure>'
    )


def _arm_legend(record: DemoRecord) -> list[tuple[str, str]]:
    return [(arm.name, colour) for arm, colour in zip(record.arms, COLOURS, strict=False)]


def _evaluations(record: DemoRecord, value: Callable[[Evaluation], float], title: str, note: str) -> str:
    series = [
        Series(arm.name, colour, [(step, value(result)) for step, result in arm.evaluations], dots=True)
        for arm, colour in zip(record.arms, COLOURS, strict=False)
    ]
    axis = Axis(title, "percent")
    return _figure(title, note, line_chart(title, series, axis), _arm_legend(record))


def _evaluation_figure(record: DemoRecord) -> str:
    note = "Share of right answers. The last point is the result, not the best one."
    return _evaluations(record, lambda result: result.accuracy, "Held-out accuracy", note)


def _perception_figure(record: DemoRecord) -> str:
    note = "How much of what the think part says about the scene is true and complete."
    return _evaluations(record, lambda result: result.perception, "Held-out perception", note)


def _steps(arm: Arm, name: str) -> list[tuple[float, float]]:
    return [(metrics["step"], metrics[name]) for metrics in arm.metrics if name in metrics]


def _smoothed(arm: Arm, metric: str, name: str, colour: str, dashed: bool = False) -> Series:
    points = _steps(arm, metric)
    return Series(name, colour, smooth(points, max(1, len(points) // 20)), raw=points, dashed=dashed)


def _reward_figure(record: DemoRecord) -> str:
    arm = record.arms[0]
    series = [_smoothed(arm, f"reward/{name}", name, colour) for name, colour in PART_COLOURS.items()]
    weights = ", ".join(f"{value:g} {name}" for name, value in PERCEPTION_R1_WEIGHTS.items())
    note = f"Mean of each part over the sampled rollouts, {arm.name}. Total = {weights}.".replace("-2 ", "−2 ")
    drawing = line_chart("Reward parts", series, Axis("mean of the part", "number", 0, 1))
    return _figure("Reward, part by part", note, drawing, [(one.name, one.colour) for one in series])


def _kinds_figure(record: DemoRecord) -> str:
    rows = []
    for kind, question in QUESTIONS.items():
        chosen = [i for i, scene in enumerate(record.held_out) if scene.kind == kind]
        if chosen:
            values = [(colour, _share(arm.after, chosen)) for arm, colour in zip(record.arms, COLOURS, strict=False)]
            rows.append((question, _share(record.arms[0].before, chosen), values))
    note = "Held-out accuracy before (hollow) and after (filled)."
    return _figure("By question", note, dumbbell_chart("Accuracy by question", rows), _arm_legend(record))


def _share(result: Evaluation, indices: Sequence[int]) -> float:
    return sum(result.correct[i] for i in indices) / len(indices)


def _entropy_figure(record: DemoRecord) -> str:
    series = [
        _smoothed(arm, "policy/entropy", arm.name, colour) for arm, colour in zip(record.arms, COLOURS, strict=False)
    ]
    note = "Mean over the sampled tokens: how undecided the policy is."
    drawing = line_chart("Entropy", series, Axis("nats per token", low=0))
    return _figure("Entropy", note, drawing, _arm_legend(record))


def _difference_figure(record: DemoRecord) -> str:
    arm = record.arms[0]
    lines = (("max", "largest", "var(--red)"), ("mean", "mean", "var(--blue)"))
    series = [_smoothed(arm, f"policy/logprob_difference_{key}", name, colour) for key, name, colour in lines]
    note = "Engine against trainer, over the tokens of each step: float32 rounding, so the policy is the one sampled."
    drawing = line_chart("Log-probability difference", series, Axis("|difference|, nats", "log"))
    legend = [(one.name, one.colour) for one in series]
    return _figure("Engine and trainer agree on log-probabilities", note, drawing, legend)


def _all_scenes(record: DemoRecord) -> str:
    return (
        f"<section><h2>All {len(record.held_out)} held-out scenes</h2><p>Sorted by what became of the answer. "
        "The first two groups are the ones McNemar’s test counts. Point at a scene for the question and both replies."
        f'</p><div class="outcomes">{mosaic(record, record.arms[0])}</div></section>'
    )


def _pruning(record: DemoRecord) -> str:
    view = record.pruning
    if view is None:
        return ""
    return (
        "<section><h2>What pruning keeps</h2><p>The language model sees a scene as four image tokens, one a quarter, "
        "and every digit lies in one of them. Here the trained model answers the held-out scenes while half of its "
        f"tokens are kept. Two tokens have room for {view.most_digits:.0%} of the digits: scenes have up to four. What "
        "is dropped before the language model is never seen; what is dropped inside it has been read by the layers "
        "before. Shown are the first scenes with two digits; dropped quarters are faded.</p>"
        f'<div class="keeps">{keeps(record, view)}</div></section>'
    )


def _rollouts(record: DemoRecord) -> str:
    return (
        f"<section><h2>Groups of rollouts, before and after</h2><p>{record.group_size} samples of each scene at "
        "temperature 1, with every part of their reward. Statements that are true of the scene are green, false ones "
        "red. The scenes are the first of each kind of question, whatever became of them.</p>"
        f"{showcase(record)}</section>"
    )


def _footer(record: DemoRecord) -> str:
    warm = f"{record.warm_start[-1][0]} supervised steps" if record.warm_start else "a supervised warm start"
    return (
        f"<footer><p>Before GRPO: {warm}, measured on scenes that are used for nothing else. Scans of "
        "training, stopping and held-out scenes are disjoint. More supervised steps would help this model too: the "
        "demo shows that GRPO learns from the engine’s rollouts, not that it beats supervision.</p>"
        "<p>Digits: “Optical Recognition of Handwritten Digits” (E. Alpaydin, C. Kaynak; UCI Machine Learning "
        "Repository), as scikit-learn carries them. Reward: Perception-R1 (arXiv 2506.07218), judged by rules.</p>"
        "</footer>"
    )
