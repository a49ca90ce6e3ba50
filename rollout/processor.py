"""From a request to what the model sees: expanded token ids, positions, patches, image spans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from foveate.rollout.checks import cut, require, shown
from foveate.rollout.images import content_hash, load_image, split_images
from foveate.rollout.messages import lift_images
from foveate.rollout.models.spec import VisionSpec
from foveate.rollout.types import Request, VisionInputs

if TYPE_CHECKING:
    from foveate.rollout.pruned import Pruning


@dataclass(frozen=True)
class ImageInput:
    """One image: its patches, and where its tokens stand in the prompt."""

    content_hash: bytes  # of patches and grid
    pixel_values: torch.Tensor  # float [patches, patch_dim]
    grid_thw: torch.Tensor  # int64 [3], patches
    start: int  # first prompt token
    num_tokens: int


@dataclass(frozen=True)
class Prompt:
    """A request's prompt as the language model sees it; filled by `PromptProcessor.prepare` and `pruned.pruned`."""

    token_ids: torch.Tensor  # int64 [P], placeholders expanded
    positions: torch.Tensor  # int64 [3, P]: time, height, width
    next_position: int  # of the first completion token
    images: tuple[ImageInput, ...]
    boundaries: tuple[int, ...]  # ends of the prompt's segments, the last is P
    pruning: Pruning | None = None

    @property
    def vision(self) -> VisionInputs | None:
        """All images of the prompt together, None without images."""
        if not self.images:
            return None
        pixels, grids = [image.pixel_values for image in self.images], [image.grid_thw for image in self.images]
        return VisionInputs(pixels[0] if len(pixels) == 1 else torch.cat(pixels), torch.stack(grids))


class PromptProcessor:
    """Prepares prompts with a tokenizer and an image processor, either of which may be absent.

    processor: anything with `.tokenizer` and `.image_processor`, or a bare tokenizer, or None: then prompts
    are token ids and images come as `VisionInputs`. Raises ValueError for anything else.
    """

    def __init__(self, processor: Any, vision: VisionSpec | None, vocab_size: int):
        self.tokenizer = getattr(processor, "tokenizer", processor)
        if self.tokenizer is not None and not (callable(self.tokenizer) and hasattr(self.tokenizer, "decode")):
            expected = "a tokenizer, or what has .tokenizer and .image_processor, or None"
            raise ValueError(f"expected {expected}, got {type(processor).__name__} (processor)")
        self.image_processor: Any = getattr(processor, "image_processor", None)
        self.template = processor if getattr(processor, "chat_template", None) else self.tokenizer
        self.vision = vision
        self.vocab_size = vocab_size

    def prepare(self, request: Request) -> Prompt:
        """Raises ValueError saying expected and got; the engine adds which request."""
        prompt, images = self._as_text_or_ids(request)
        vision = request.vision or self._process_images(images)
        grids, pixels = self._split_images(vision)
        tokens = [int(grid.prod()) // self.vision.merge_size**2 for grid in grids] if self.vision else []
        if isinstance(prompt, str):
            ids = self._expand(self._tokenize(prompt, _is_plain_text(request)), tokens)
        else:
            # A copy: the caller may write to its tensor while the request waits.
            ids = torch.as_tensor(prompt, dtype=torch.int64, device="cpu").clone()
        self._check_ids(ids)
        spans = self._image_spans(ids, tokens)
        inputs = tuple(
            ImageInput(content_hash(pixel, grid), pixel, grid, start, count)
            for pixel, grid, (start, count) in zip(pixels, grids, spans, strict=True)
        )
        positions, next_position = self._positions(ids, grids)
        return Prompt(ids, positions, next_position, inputs, self._boundaries(request, ids, spans))

    def _as_text_or_ids(self, request: Request) -> tuple[Any, list[Any]]:
        prompt: Any = request.prompt
        images = list(request.images)
        if isinstance(prompt, (np.ndarray, torch.Tensor)):
            if prompt.ndim != 1 or not _is_integer(prompt):
                raise ValueError(f"expected integer ids [P], got {prompt.dtype} {list(prompt.shape)} (prompt)")
            if isinstance(prompt, np.ndarray) and prompt.size:
                self._check_range(int(prompt.min()), int(prompt.max()))  # an unsigned one may not fit into int64
            return prompt if isinstance(prompt, torch.Tensor) else prompt.tolist(), images
        if not isinstance(prompt, (str, Sequence)) or isinstance(prompt, (bytes, bytearray, memoryview)):
            raise ValueError(f"expected text, chat messages or token ids, got {type(prompt).__name__} (prompt)")
        if len(prompt) == 0:
            got = f"{type(prompt).__name__} of length 0"
            raise ValueError(f"expected text, chat messages or token ids, got {got} (prompt)")
        if not isinstance(prompt, str) and not isinstance(prompt[0], Mapping):
            for index, token in enumerate(prompt):
                is_int = isinstance(token, (int, np.integer)) and not isinstance(token, bool)
                require(is_int, "token ids to be ints", token, f"prompt[{index}]")
            self._check_range(min(prompt), max(prompt))
            return prompt, images
        if self.tokenizer is None:
            raise ValueError("expected token ids, because the engine has no tokenizer, got text (prompt)")
        if isinstance(prompt, str):
            return prompt, images
        messages, embedded = lift_images(prompt)
        if embedded and (images or request.vision is not None):
            also = f"{len(images)} in images" if images else "vision"
            raise ValueError(f"expected images in one place, got {len(embedded)} in the messages and {also} (images)")
        return self._render(messages, generation=True), images or embedded

    def _render(self, messages: list[dict], generation: bool) -> str:
        try:
            return self.template.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
        except Exception as error:  # templates run on whatever messages hold, and may raise on their own
            raise ValueError(f"expected messages that the chat template accepts, got: {cut(error)} (prompt)") from error

    def _tokenize(self, text: str, special: bool) -> list[int]:
        try:
            return self.tokenizer(text, add_special_tokens=special)["input_ids"]
        except Exception as error:  # whatever a tokenizer raises concerns this request alone
            raise ValueError(f"expected text that the tokenizer encodes, got: {cut(repr(error))} (prompt)") from error

    def _process_images(self, images: list[Any]) -> VisionInputs | None:
        if not images:
            return None
        if self.vision is None:
            raise ValueError(f"expected no images for a text model, got {len(images)} (images)")
        if self.image_processor is None:
            raise ValueError("expected VisionInputs, because the engine has no image processor, got images (images)")
        outputs = [self._process_image(image, f"images[{index}]") for index, image in enumerate(images)]
        return VisionInputs(
            torch.cat([output["pixel_values"] for output in outputs]),
            torch.cat([output["image_grid_thw"] for output in outputs]),
        )

    def _process_image(self, image: Any, argument: str) -> Any:
        loaded = load_image(image, argument)
        try:
            return self.image_processor(images=[loaded], return_tensors="pt")
        except Exception as error:  # what an image processor refuses, it refuses in its own words
            got = f"{loaded.size[1]} x {loaded.size[0]} pixels: {cut(error)}"
            raise ValueError(f"expected an image that the image processor accepts, got {got} ({argument})") from error

    def _split_images(self, vision: VisionInputs | None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """-> one grid int64 [3] and one float [patches, patch_dim] an image, checked against each other."""
        if vision is None:
            return [], []
        if self.vision is None:
            raise ValueError("expected no images for a text model, got VisionInputs (vision)")
        return split_images(vision, self.vision.merge_size, self.vision.patch_dim)

    def _expand(self, text_ids: list[int], tokens: list[int]) -> torch.Tensor:
        """Repeats the k-th image placeholder tokens[k] times."""
        ids = torch.tensor(text_ids, dtype=torch.int64, device="cpu")
        if self.vision is None:
            return ids
        is_image = ids.eq(self.vision.image_token_id)
        if int(is_image.sum()) != len(tokens):
            raise ValueError(
                f"expected one placeholder an image, got {int(is_image.sum())} for {len(tokens)} images (prompt)"
            )
        repeats = torch.ones_like(ids)
        repeats[is_image] = torch.tensor(tokens, dtype=torch.int64, device="cpu")
        return ids.repeat_interleave(repeats)

    def _check_ids(self, ids: torch.Tensor) -> None:
        if ids.numel() == 0:
            raise ValueError("expected at least one token, got none (prompt)")
        self._check_range(int(ids.min()), int(ids.max()))
        video = None if self.vision is None else self.vision.video_token_id
        if video is not None and (ids == video).any():
            raise ValueError(f"expected no video placeholders, which are not supported, got id {video} (prompt)")

    def _check_range(self, low: int, high: int) -> None:
        if low < 0 or high >= self.vocab_size:
            got = shown(low if low < 0 else high)
            raise ValueError(f"expected ids in [0, {self.vocab_size}), got {got} (prompt)")

    def _image_spans(self, ids: torch.Tensor, tokens: list[int]) -> list[tuple[int, int]]:
        if self.vision is None:
            return []
        places = (ids == self.vision.image_token_id).nonzero().flatten().tolist()
        if len(places) != sum(tokens):
            raise ValueError(_miscounted(places, tokens))
        spans: list[tuple[int, int]] = []
        taken = 0
        for index, count in enumerate(tokens):
            span = places[taken : taken + count]
            if span[-1] - span[0] != count - 1:
                raise ValueError(f"expected {count} adjacent placeholders, got a gap (image {index})")
            if spans and sum(spans[-1]) == span[0]:
                raise ValueError(f"expected a token between two images, got none before image {index} (prompt)")
            spans.append((span[0], count))
            taken += count
        return spans

    def _positions(self, ids: torch.Tensor, grids: list[torch.Tensor]) -> tuple[torch.Tensor, int]:
        if self.vision is None or not grids:
            return torch.arange(len(ids), device="cpu").expand(3, -1), len(ids)
        return self.vision.positions(ids, torch.stack(grids))

    def _boundaries(self, request: Request, ids: torch.Tensor, spans: list[tuple[int, int]]) -> tuple[int, ...]:
        prefix = request.prefix_len if request.prefix_len is not None else self._system_len(request, ids)
        if prefix > len(ids):
            raise ValueError(f"expected at most the prompt's {len(ids)} tokens, got {shown(prefix)} (prefix_len)")
        for index, (start, count) in enumerate(spans):
            if start < prefix < start + count:
                raise ValueError(
                    f"expected a prefix that does not cut image {index} at {start}, got {prefix} (prefix_len)"
                )
        return (len(ids),) if prefix in (0, len(ids)) else (prefix, len(ids))

    def _system_len(self, request: Request, ids: torch.Tensor) -> int:
        """Tokens of a leading system message; 0 if the template cannot render it alone as a prefix."""
        prompt: Any = request.prompt
        if (
            isinstance(prompt, (str, torch.Tensor))
            or not isinstance(prompt[0], Mapping)
            or prompt[0]["role"] != "system"
        ):
            return 0
        try:
            text = self._render([lift_images(prompt[:1])[0][0]], generation=False)
        except ValueError:  # templates may refuse a conversation without a user
            return 0
        prefix = torch.tensor(
            self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64, device="cpu"
        )
        return len(prefix) if torch.equal(ids[: len(prefix)], prefix) else 0


@dataclass(frozen=True)
class Processor:
    """A tokenizer and an image processor side by side; transformers' own classes may need torchvision."""

    tokenizer: Any
    image_processor: Any = None


def load_processor(path: Any, has_vision: bool, *, trust_remote_code: bool = False) -> Processor:
    """The tokenizer of a saved model and, for a vision-language model, Qwen's image processor on PIL.

    The class is named, because `AutoImageProcessor` asks for torchvision in some versions of transformers.
    trust_remote_code: run code that comes with the tokenizer.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    if not has_vision:
        return Processor(tokenizer)
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Processor(tokenizer, Qwen2VLImageProcessorPil.from_pretrained(path))


def _miscounted(places: list[int], tokens: list[int]) -> str:
    """The first image whose placeholders, one run of `places` an image, are too few or too many."""
    starts = [i for i, place in enumerate(places) if i == 0 or place != places[i - 1] + 1]
    runs = [stop - start for start, stop in pairwise([*starts, len(places)])]
    for index, count in enumerate(tokens):
        found = runs[index] if index < len(runs) else 0
        if found != count:
            expected = f"expected {count} image placeholders for image {index}, got {found} (prompt)"
            return f"{expected}: token ids must have their placeholders expanded, and a token between two images"
    return f"expected placeholders for {len(tokens)} images, got more from {places[starts[len(tokens)]]} on (prompt)"


def _is_integer(ids: np.ndarray | torch.Tensor) -> bool:
    if isinstance(ids, np.ndarray):
        return ids.dtype.kind in "iu"
    return not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)


def _is_plain_text(request: Request) -> bool:
    """Chat templates write their own special tokens; plain text gets the tokenizer's."""
    return isinstance(request.prompt, str)
