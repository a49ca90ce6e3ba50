"""Chat messages as callers write them: checked, and their images taken out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from foveate.rollout.checks import require, shown


def lift_images(messages: Sequence[Any]) -> tuple[list[dict], list[Any]]:
    """Copies of the messages, with items `{"type": "image"}` for their images, and the images in order.

    A message has a role, a str, which the chat template judges, and content: a str or a list of items
    `{"type": "text", "text": str}` and `{"type": "image", "image": anything or absent}`, or None beside tool_calls.
    Other keys of messages are the template's; other keys of an image item would be dropped, and are refused unless
    None. Raises ValueError.
    """
    lifted, images = [], []
    for index, message in enumerate(messages):
        has_role = isinstance(message, Mapping) and isinstance(message.get("role"), str)
        if not has_role:
            raise ValueError(f"expected messages with a role, got {shown(message)} (prompt)")
        content, place = message.get("content"), f"prompt[{index}]['content']"
        if isinstance(content, str) or (content is None and message.get("tool_calls")):
            lifted.append(dict(message))
            continue
        require(isinstance(content, (list, tuple)), "a str or a list of items", content, place)
        items = []
        for number, item in enumerate(content):
            items.append(_item(item, f"{place}[{number}]"))
            if item["type"] == "image" and item.get("image") is not None:
                images.append(item["image"])
        lifted.append({**message, "content": items})
    return lifted, images


def _item(item: Any, place: str) -> dict[str, Any]:
    """The item as the template sees it."""
    is_known = isinstance(item, Mapping) and item.get("type") in ("text", "image")
    require(is_known, "an item {'type': 'text' or 'image', ...}", item, place)
    if item["type"] == "text":
        require(isinstance(item.get("text"), str), "a str", item.get("text"), f"{place}['text']")
        return dict(item)
    more = [key for key, value in item.items() if key not in ("type", "image") and value is not None]
    require(not more, "an image item with no key but 'type' and 'image'", more, place)
    return {"type": "image"}
