"""Files of prompts: JSON lines or parquet; what each line may hold, and requests made of them.

A line is an object with these keys, all but the prompt optional; docs/rollout_format.md says the same to users.

id         str or int; the number of the line where it is missing
prompt     text, which becomes a user's message after its images; or chat messages; or token ids
text       instead of prompt: text that is taken as it is, without a chat template
images     paths, relative to the file's folder or to image_root, in the order of their placeholders
n, seed    samples of this prompt and where their noise begins, instead of the command's
answer, facts, metadata   what rewards read: see `foveate.rollout.rewards`
"""

from __future__ import annotations

import codecs
import difflib
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from foveate.rollout.checks import require
from foveate.rollout.config import SamplingParams
from foveate.rollout.types import Request

KEYS = ("id", "prompt", "text", "images", "n", "seed", "answer", "facts", "metadata")
SEED_BITS = 53  # every reader of JSON keeps such integers exactly


@dataclass(frozen=True)
class Defaults:
    """What a line that is silent about it gets. image_root: None is the folder of the file."""

    n: int
    seed: int
    sampling: SamplingParams
    system: str | None = None
    image_root: Path | None = None


@dataclass(frozen=True)
class BadLine:
    """A line that makes no request. line: counted from 1. id: where it could be read."""

    line: int
    reason: str
    id: str | None = None


@dataclass(frozen=True, repr=False)
class ImageFile(os.PathLike):
    """An image of a line. path: where it was found. written: how the line names it."""

    path: Path
    written: str

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return repr(str(self.path))


def count_lines(path: Path) -> int:
    """How many lines (rows, in parquet) a file of prompts has; blank ones do not count."""
    if path.suffix == ".parquet":
        return _parquet(path).metadata.num_rows
    return sum(1 for _ in _lines(path))


def read_requests(path: Path, defaults: Defaults) -> Iterator[tuple[int, Request] | BadLine]:
    """(number of its line, its request) for each line, in order, or why there is none.

    Every request has a request_id, unique in the file, and a seed of its own, which depends on defaults.seed and the id
    alone. Raises OSError if the file cannot be read, ImportError for parquet without pyarrow.
    """
    seen: dict[str, int] = {}
    root = defaults.image_root or path.parent
    for number, read in _rows(path):
        name = None
        try:
            row = read()
            name = _id_of(row, number)
            request = _request(row, name, defaults, root)
            require(name not in seen, f"an id of its own, not that of line {seen.get(name)}", name, "id")
        except (ValueError, RecursionError) as error:
            yield BadLine(number, str(error) or type(error).__name__, name)
            continue
        seen[name] = number
        yield number, request


def fingerprint(request: Request) -> str:
    """16 hex digits of what a request asks, to see that a line has changed.

    Images that are files count as the line writes their names, whatever is in them and wherever they were found.
    """
    content = json.dumps([request.prompt, request.images, request.n, request.sampling.seed], default=_as_text)
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def _as_text(image: Any) -> str:
    if isinstance(image, ImageFile):
        return image.written
    return str(image) if isinstance(image, os.PathLike) else hashlib.blake2b(image.tobytes()).hexdigest()


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(number of the line, a function that reads it)."""
    if path.suffix == ".parquet":
        number = 0
        for batch in _parquet(path).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield number, lambda row=row: row
        return
    for number, line in _lines(path):
        yield number, lambda line=line: _object(line)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(its number, counted from 1, a line) for each line that is not blank; without a byte order mark."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line and not line.isspace():
                yield number, line


def _object(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"expected a JSON object, got {_short(line.strip())}: {error}") from error


def _parquet(path: Path) -> Any:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ImportError(f"expected pyarrow to be installed for {path}: pip install 'foveate[parquet]'") from error
    return ParquetFile(path)


def _id_of(row: Any, number: int) -> str:
    require(isinstance(row, dict), "a JSON object", _short(row), "line")
    name = row.get("id")
    name = number if name is None else name
    require(isinstance(name, (str, int)) and not isinstance(name, bool), "a str or an int", name, "id")
    return str(name)


def _request(row: dict, name: str, defaults: Defaults, root: Path) -> Request:
    row = {key: value for key, value in row.items() if value is not None}
    for key in row:
        near = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.0)
        require(key in KEYS, f"a key such as {near[0] if near else KEYS[1]!r}", key, "key")
    given = [key for key in ("prompt", "text") if key in row]
    require(len(given) == 1, "either prompt or text", given, "key")
    images = row.get("images", [])
    require(isinstance(images, list), "a list of paths", _short(images), "images")
    metadata = row.get("metadata", {})
    require(isinstance(metadata, dict), "an object", _short(metadata), "metadata")
    images = [_image(image, root) for image in images]
    seed = row.get("seed", _seed(defaults.seed, name))
    return Request(
        _prompt(row, len(images), defaults, root),
        images=images,
        n=row.get("n", defaults.n),
        sampling=replace(defaults.sampling, seed=seed),
        request_id=name,
        metadata={**metadata, **{key: row[key] for key in ("answer", "facts") if key in row}},
    )


def _prompt(row: dict, num_images: int, defaults: Defaults, root: Path) -> Any:
    if "text" in row:
        require(isinstance(row["text"], str), "a string", _short(row["text"]), "text")
        return row["text"]
    prompt = row["prompt"]
    require(isinstance(prompt, (str, list)) and len(prompt) > 0, "text, messages or ids", _short(prompt), "prompt")
    if isinstance(prompt, list) and not isinstance(prompt[0], dict):
        return prompt
    if isinstance(prompt, str):
        content: Any = prompt
        if num_images:
            content = [{"type": "image"}] * num_images + [{"type": "text", "text": prompt}]
        prompt = [{"role": "user", "content": content}]
    messages = [_located(message, root) for message in prompt]
    if defaults.system is not None and messages[0].get("role") != "system":
        messages.insert(0, {"role": "system", "content": defaults.system})
    return messages


def _located(message: Any, root: Path) -> dict:
    """The message with images found that stand in its items."""
    require(isinstance(message, dict) and "role" in message, "messages with a role", _short(message), "prompt")
    content = message.get("content")
    if not isinstance(content, list):
        return message
    items = [
        {**item, "image": _image(item["image"], root)} if isinstance(item, Mapping) and item.get("image") else item
        for item in content
    ]
    return {**message, "content": items}


def _image(image: Any, root: Path) -> Any:
    """A file that exists, or the picture itself where parquet holds its bytes."""
    if isinstance(image, dict) and image.get("bytes") is not None:
        return _decoded(image["bytes"])
    image = image.get("path") if isinstance(image, dict) else image
    require(isinstance(image, str), "a path", _short(image), "images")
    scheme = image.partition(":")[0].lower()
    remote = (scheme == "data" and ":" in image) or image[len(scheme) :].startswith("://")
    require(not remote, f"a path, not a {scheme} URL", _short(image), "images")
    path = root / image
    try:
        found, reason = path.is_file(), ""
    except OSError as error:  # a name that is too long, a folder that may not be read
        found, reason = False, f": {error.strerror}"
    shown = str(path) if len(str(path)) <= 300 else f"{str(path)[:150]}...{str(path)[-147:]}"
    require(found, f"an image file{reason}", shown, "images")
    return ImageFile(path, image)


def _decoded(content: Any) -> Any:
    from PIL import Image

    require(isinstance(content, bytes), "the bytes of an image file", type(content).__name__, "images")
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"expected the bytes of an image file, got {len(content)} others: {error} (images)") from error
    return image


def _seed(seed: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> (64 - SEED_BITS)


def _short(value: Any) -> Any:
    """What a message can show of a value."""
    text = repr(value)
    return value if len(text) <= 80 else f"{text[:77]}..."
