"""The report's scenes: every held-out scene by what became of it, and groups of rollouts before and after."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

from PIL import Image

from foveate.rollout.demo.record import Arm, DemoRecord, Reply
from foveate.rollout.demo.scenes import PLACES, Scene

PARTS = {"accuracy": "acc.", "format": "form.", "perception": "perc.", "repetition": "rep."}  # name: head of column
OUTCOMES = (
    ("gained", "wrong before, right after", False, True),
    ("lost", "right before, wrong after", True, False),
    ("kept", "right before and after", True, True),
    ("missed", "wrong before and after", False, False),
)


def data_url(image: Image.Image) -> str:
    """The image as a PNG inside the page; the browser enlarges it without smoothing."""
    buffer = io.BytesIO()
    image.convert("L").save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def picture(scene: Scene, title: str) -> str:
    words = f'alt="{_escape(alt_text(scene))}" title="{_escape(title)}"'
    return f'<img class="scene" src="{data_url(scene.image)}" {words}>'


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


def _escape(text: str) -> str:
    return html.escape(text, quote=True)
