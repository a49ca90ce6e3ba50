"""The report's scenes: every held-out scene by what became of it, and groups of rollouts before and after."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

from PIL import Image

from foveate.rollout.demo.record import Arm, DemoRecord, PrunedRun, PrunedSite, PruningView, Reply
from foveate.rollout.demo.scenes import CANVAS, PLACES, Scene

PARTS = {"accuracy": "acc.", "format": "form.", "perception": "perc.", "repetition": "rep."}  # name: head of column
FADED = 40  # of 255, opacity of a dropped quarter
OUTCOMES = (
    ("gained", "wrong before, right after", False, True),
    ("lost", "right before, wrong after", True, False),
    ("kept", "right before and after", True, True),
    ("missed", "wrong before and after", False, False),
)


def data_url(image: Image.Image) -> str:
    """The grey image as a PNG inside the page; the browser enlarges it without smoothing."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def picture(scene: Scene, title: str) -> str:
    return _img(scene.image.convert("L"), "scene", alt_text(scene), title)


def _img(image: Image.Image, style: str, alt: str, title: str) -> str:
    words = f'alt="{_escape(alt)}" title="{_escape(title)}"'
    return f'<img class="{style}" src="{data_url(image)}" {words}>'


def alt_text(scene: Scene) -> str:
    """What the scene shows, in words."""
    return ", ".join(f"{place} {digit}" for place, digit in scene.digits)


def mosaic(record: DemoRecord, arm: Arm) -> str:
    """All held-out scenes, by what became of their answer."""
    sections = []
    for name, words, before, after in OUTCOMES:
        chosen = [
            index
            for index, pair in enumerate(zip(arm.before.correct, arm.after.correct, strict=True))
            if pair == (before, after)
        ]
        pictures = "".join(_thumbnail(record.held_out[i], arm, i) for i in chosen)
        head = f'<h3><span class="count">{len(chosen)}</span> {words}</h3>'
        sections.append(f'<section class="outcome {name}">{head}<div class="thumbs">{pictures}</div></section>')
    return "".join(sections)


def _thumbnail(scene: Scene, arm: Arm, index: int) -> str:
    lines = (
        f"{scene.question}  (right answer: {scene.answer})",
        f"before: {arm.before.texts[index]}",
        f"after: {arm.after.texts[index]}",
    )
    return picture(scene, "\n".join(lines))


def showcase(record: DemoRecord) -> str:
    """The shown scenes, each with its group of rollouts before and after every run."""
    cards = []
    for place, index in enumerate(record.showcase):
        scene = record.held_out[index]
        columns = [("after the warm start", record.before_samples[place])]
        columns += [(f"after GRPO {arm.name}", arm.samples[place]) for arm in record.arms]
        tables = "".join(f"<div><h4>{_escape(title)}</h4>{_group(scene, replies)}</div>" for title, replies in columns)
        cards.append(
            f'<article class="card"><div class="subject">{picture(scene, alt_text(scene))}'
            f'<p class="question">{_escape(scene.question)}</p>'
            f'<p class="gold">right answer <b>{_escape(scene.answer)}</b></p>'
            f"<p class='facts'>{_facts(scene)}</p></div><div class='groups'>{tables}</div></article>"
        )
    return "".join(cards)


def _facts(scene: Scene) -> str:
    return "<br>".join(f"{_escape(place)} <b>{digit}</b>" for place, digit in scene.digits)


def _group(scene: Scene, replies: Sequence[Reply]) -> str:
    heads = "".join(f'<th title="{name}">{short}</th>' for name, short in (*PARTS.items(), ("total", "total")))
    right = sum(reply.parts.get("accuracy") == 1.0 for reply in replies)
    rows = "".join(_row(scene, reply) for reply in replies)
    caption = f"<caption>{right} of {len(replies)} right</caption>"
    return f"<table>{caption}<thead><tr><th></th><th>rollout</th>{heads}</tr></thead><tbody>{rows}</tbody></table>"


def _row(scene: Scene, reply: Reply) -> str:
    right = reply.parts.get("accuracy") == 1.0
    mark = '<td class="mark yes" title="right">✓</td>' if right else '<td class="mark no" title="wrong">✗</td>'
    cells = [_number(reply.parts.get(name)) for name in PARTS] + [_number(reply.total, "total")]
    return f'<tr>{mark}<td class="reply">{highlight(scene, reply)}</td>{"".join(cells)}</tr>'


def _number(value: float | None, style: str = "") -> str:
    if value is None:
        return f'<td class="number {style}" title="not scored">–</td>'
    shade = " full" if value == 1.0 else " zero" if value == 0 else ""
    return f'<td class="number {style}{shade}">{value:.2f}</td>'


def highlight(scene: Scene, reply: Reply) -> str:
    """The reply as HTML: the think part's statements and the answer marked true or false, tags in the background."""
    words = reply.text.split()
    facts = set(scene.facts)
    right = "true" if reply.parts.get("accuracy") == 1.0 else "false"
    parts: list[str] = []
    index, section = 0, ""
    while index < len(words):
        word, following = words[index], words[index + 1] if index + 1 < len(words) else ""
        index += 1
        if word.startswith("<"):
            section = word
            parts.append(f'{"<br>" if word == "<answer>" and parts else ""}<span class="tag">{_escape(word)}</span>')
        elif section == "<think>" and word in PLACES and following.isdigit():
            index += 1
            style = "true" if (word, following) in facts else "false"
            parts.append(f'<span class="{style}">{_escape(word)} {_escape(following)}</span>')
        elif section == "<answer>":
            style = "tag" if word in ("\\boxed{", "}") else right
            parts.append(f'<span class="{style}">{_escape(word)}</span>')
        else:
            parts.append(_escape(word))
    return " ".join(parts) or '<span class="tag">(empty)</span>'


def keeps(record: DemoRecord, view: PruningView) -> str:
    """The shown scenes as each method leaves them, with what that is worth."""
    scenes = [record.held_out[index] for index in view.shown]
    whole = PrunedSite(0, len(PLACES), 1.0, tuple((True,) * len(PLACES) for _ in scenes))
    runs = (PrunedRun("nothing pruned", view.accuracy, (whole,)), *view.runs)
    return "".join(_method(run, scenes) for run in runs)


def _method(run: PrunedRun, scenes: Sequence[Scene]) -> str:
    head = f'<h3>{_escape(run.method)}</h3><p class="right"><b>{run.accuracy:.1%}</b> answered right</p>'
    sites = "".join(_site(site, scenes) for site in run.sites)
    return f'<article class="method"><div>{head}</div><div>{sites}</div></article>'


def _site(site: PrunedSite, scenes: Sequence[Scene]) -> str:
    where = f"from layer {site.layer} on" if site.layer else "before the language model"
    left = f"{site.tokens} of {len(PLACES)} tokens, <b>{site.digits:.0%}</b> of the digits"
    pictures = "".join(_faded(scene, flags) for scene, flags in zip(scenes, site.kept, strict=True))
    return f'<div class="site"><p>{where}<br>{left}</p><div class="thumbs">{pictures}</div></div>'


def _faded(scene: Scene, kept: Sequence[bool]) -> str:
    """The scene with its dropped quarters nearly transparent."""
    image, half = scene.image.convert("LA"), CANVAS // 2
    mask = Image.new("L", (2, 2))
    mask.putdata([255 if flag else FADED for flag in kept])
    image.putalpha(mask.resize((2 * half, 2 * half), Image.Resampling.NEAREST))
    names = [place for place, flag in zip(PLACES, kept, strict=True) if flag]
    return _img(image, "scene", alt_text(scene), f"kept: {', '.join(names)}")


def _escape(text: str) -> str:
    return html.escape(text, quote=True)
