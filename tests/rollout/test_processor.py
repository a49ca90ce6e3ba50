"""Prompts against transformers' own rules: placeholders, positions, boundaries, and what is refused."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from foveate.rollout.models import describe
from foveate.rollout.processor import Processor, PromptProcessor, load_processor
from foveate.rollout.testing import VOCAB_SIZE, special_id, tiny_model, tiny_processor
from foveate.rollout.types import Request, VisionInputs

Image = pytest.importorskip("PIL.Image")
PAD, VIDEO = special_id("<|image_pad|>"), special_id("<|video_pad|>")
START, END = special_id("<|vision_start|>"), special_id("<|vision_end|>")
IM_START, IM_END = special_id("<|im_start|>"), special_id("<|im_end|>")
SYSTEM = {"role": "system", "content": "Look well."}
USER = {"role": "user", "content": "Hi"}
PATCH_DIM = 3 * 2 * 14 * 14


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen2_5_vl")


@pytest.fixture(scope="module")
def prepare(model):
    """prepare(prompt, **Request fields) -> Prompt, with tokenizer and image processor."""
    processor = PromptProcessor(tiny_processor(), describe(model).vision, VOCAB_SIZE)
    return lambda prompt, **fields: processor.prepare(Request(prompt, **fields))


def prepare_with(processor, model=None):
    """The same with another processor, and without vision when there is no model."""
    prompts = PromptProcessor(processor, describe(model).vision if model is not None else None, VOCAB_SIZE)
    return lambda prompt, **fields: prompts.prepare(Request(prompt, **fields))


def text_ids(text: str) -> list[int]:
    return tiny_processor().tokenizer(text, add_special_tokens=False)["input_ids"]


def vision_inputs(*grids: tuple[int, int, int], **fields) -> VisionInputs:
    patches = sum(math.prod(grid) for grid in grids)
    return VisionInputs(
        **{"pixel_values": torch.randn(patches, PATCH_DIM), "image_grid_thw": torch.tensor(grids)} | fields
    )


def resized(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of merged tokens by Qwen's rule: sides to multiples of 28, 4 to 1280 tokens."""
    rows, columns = round(height / 28), round(width / 28)
    if rows * columns > 1280:
        shrink = math.sqrt(height * width / (1280 * 28 * 28))
        return max(1, math.floor(height / shrink / 28)), max(1, math.floor(width / shrink / 28))
    if rows * columns < 4:
        grow = math.sqrt(4 * 28 * 28 / (height * width))
        return math.ceil(height * grow / 28), math.ceil(width * grow / 28)
    return rows, columns


class TestIds:
    @pytest.mark.parametrize(
        "ids",
        [
            [5, 6, 7],
            (5, 6, 7),
            range(5, 8),
            [np.int32(5), 6, np.int64(7)],
            torch.tensor([5, 6, 7]),
            torch.tensor([5, 6, 7], dtype=torch.int32),
            torch.tensor([5, 0, 6, 0, 7])[::2],
            np.array([5, 6, 7], np.uint16),
            np.array([7, 6, 5])[::-1],
        ],
        ids=lambda ids: f"{type(ids).__name__}-{getattr(ids, 'dtype', '')}",
    )
    def test_every_kind_of_ids(self, prepare, ids):
        prompt = prepare(ids)
        assert prompt.token_ids.tolist() == [5, 6, 7]
        assert prompt.token_ids.dtype == torch.int64
        assert prompt.token_ids.is_contiguous()
        assert prompt.positions.tolist() == [[0, 1, 2]] * 3
        assert (prompt.next_position, prompt.boundaries, prompt.images, prompt.vision) == (3, (3,), (), None)

    @pytest.mark.parametrize("kind", [torch.tensor, np.array])
    def test_the_prompt_is_a_copy(self, prepare, kind):
        ids = kind([5, 6, 7])
        prompt = prepare(ids)
        ids[0] = 9
        assert prompt.token_ids.tolist() == [5, 6, 7]

    def test_without_any_processor(self):
        assert prepare_with(None)([5]).token_ids.tolist() == [5]


class TestText:
    def test_plain_text_with_special_tokens_of_its_own(self, prepare):
        prompt = prepare("a<|im_end|>ö")
        assert prompt.token_ids.tolist() == [*text_ids("a"), IM_END, *text_ids("ö")]
        assert prompt.boundaries == (4,)

    def test_plain_text_gets_the_tokenizers_special_tokens_and_messages_do_not(self):
        processor, eos = tiny_processor(), special_id("<|endoftext|>")
        processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", eos)]
        )
        prepare = prepare_with(processor)
        assert prepare("a").token_ids.tolist() == [eos, *text_ids("a")]
        assert prepare([SYSTEM, USER]).token_ids[0] == IM_START
        assert len(prepare([SYSTEM, USER]).boundaries) == 2

    def test_a_bare_tokenizer(self):
        assert prepare_with(tiny_processor().tokenizer)("ab").token_ids.tolist() == text_ids("ab")


def rendered(system: str, user: str) -> tuple[list[int], list[int]]:
    """The tiny chat template by hand: ids of the system message, ids of all that follows."""
    head = [IM_START, *text_ids(f"system\n{system}"), IM_END, *text_ids("\n")]
    tail = [IM_START, *text_ids(f"user\n{user}"), IM_END, *text_ids("\n"), IM_START, *text_ids("assistant\n")]
    return head, tail


class TestMessages:
    def test_a_leading_system_message_is_a_segment(self, prepare):
        head, tail = rendered("Look well.", "Hi")
        prompt = prepare([SYSTEM, USER])
        assert prompt.token_ids.tolist() == head + tail
        assert prompt.boundaries == (len(head), len(head) + len(tail))

    def test_content_as_items(self, prepare):
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in (SYSTEM, USER)]
        assert torch.equal(prepare(messages).token_ids, prepare([SYSTEM, USER]).token_ids)
        assert prepare(messages).boundaries == prepare([SYSTEM, USER]).boundaries

    def test_no_leading_system_message(self, prepare):
        assert prepare([USER]).boundaries == (len(rendered("", "Hi")[1]),)
        assert len(prepare([USER, SYSTEM]).boundaries) == 1

    @pytest.mark.parametrize(
        "extra", ["{% if messages|length == 1 %}{{ raise_exception('no user') }}{% endif %}", None]
    )
    def test_a_template_whose_system_message_is_no_prefix(self, extra):
        """It refuses a system message alone, or writes how many messages follow before it."""
        processor = tiny_processor()
        template = processor.tokenizer.chat_template
        processor.tokenizer.chat_template = (extra or "{{ messages|length }}") + template
        prompt = prepare_with(processor)([SYSTEM, USER])
        assert prompt.boundaries == (len(prompt.token_ids),)
        head, tail = rendered("Look well.", "Hi")
        assert prompt.token_ids.tolist() == ([] if extra else text_ids("2")) + head + tail

    def test_the_template_of_the_processor_comes_first(self):
        class Whole(Processor):
            chat_template = "its own"

            def apply_chat_template(self, messages, tokenize, add_generation_prompt):
                assert not tokenize
                return "".join(m["content"] for m in messages) + "!" * add_generation_prompt

        processor = tiny_processor()
        prompt = prepare_with(Whole(processor.tokenizer, processor.image_processor))([SYSTEM, USER])
        assert prompt.token_ids.tolist() == text_ids("Look well.Hi!")
        assert prompt.boundaries == (10, 13)

    def test_the_request_is_left_as_it_was(self, prepare, picture):
        image = picture(60, 60)
        messages = [{"role": "user", "content": [{"type": "image", "image": image}]}]
        prepare(messages)
        assert messages[0]["content"][0]["image"] is image


class TestPrefix:
    @pytest.mark.parametrize(("prefix", "boundaries"), [(0, (4,)), (1, (1, 4)), (3, (3, 4)), (4, (4,))])
    def test_of_ids(self, prepare, prefix, boundaries):
        assert prepare([1, 2, 3, 4], prefix_len=prefix).boundaries == boundaries

    def test_it_stands_above_the_system_message(self, prepare):
        whole = len(prepare([SYSTEM, USER]).token_ids)
        assert prepare([SYSTEM, USER], prefix_len=0).boundaries == (whole,)
        assert prepare([SYSTEM, USER], prefix_len=5).boundaries == (5, whole)

    @pytest.mark.parametrize("prefix", range(10))
    def test_it_may_not_cut_an_image(self, prepare, prefix):
        """Placeholders stand at 2 to 7."""
        fields = {"vision": vision_inputs((1, 4, 6)), "prefix_len": prefix}
        ids = [1, START, *[PAD] * 6, END, 2]
        if 2 < prefix < 8:
            with pytest.raises(ValueError, match=rf"does not cut image 0 at 2, got {prefix} \(prefix_len\)"):
                prepare(ids, **fields)
        else:
            assert prepare(ids, **fields).boundaries == ((prefix, 10) if prefix else (10,))


SIZES = [(60, 60), (30, 300), (300, 30), (57, 113), (1, 1), (20, 10), (70, 42)]


class TestImages:
    @pytest.mark.parametrize("size", [*SIZES, (1400, 1400), (200, 6000)], ids=str)
    def test_number_of_placeholders(self, prepare, picture, size):
        rows, columns = resized(*size)
        prompt = prepare("a<|vision_start|><|image_pad|><|vision_end|>b", images=[picture(*size)])
        ids = [*text_ids("a"), START, *[PAD] * (rows * columns), END, *text_ids("b")]
        assert prompt.token_ids.tolist() == ids
        (image,) = prompt.images
        assert (image.start, image.num_tokens) == (2, rows * columns)
        assert image.grid_thw.tolist() == [1, 2 * rows, 2 * columns]
        assert image.pixel_values.shape == (4 * rows * columns, PATCH_DIM)

    def test_several_images_in_order(self, prepare, picture):
        images = [picture(*size) for size in SIZES]
        counts = [math.prod(resized(*size)) for size in SIZES]
        prompt = prepare("x<|image_pad|>" * len(images), images=images)
        assert prompt.token_ids.tolist() == [i for count in counts for i in (*text_ids("x"), *[PAD] * count)]
        assert [image.num_tokens for image in prompt.images] == counts
        starts = [1 + index + sum(counts[:index]) for index in range(len(counts))]
        assert [image.start for image in prompt.images] == starts
        together = tiny_processor().image_processor(images=[Image.fromarray(i) for i in images], return_tensors="pt")
        assert torch.equal(prompt.vision.pixel_values, together["pixel_values"])
        assert torch.equal(prompt.vision.image_grid_thw, together["image_grid_thw"])

    def test_images_in_messages(self, prepare, picture):
        """Inside the items, or beside the messages in the order of the items."""
        images = [picture(60, 60), picture(30, 300)]

        def messages(*contents: dict) -> list[dict]:
            items = [
                {"type": "image", **contents[0]},
                {"type": "text", "text": "and"},
                {"type": "image", **contents[1]},
            ]
            return [SYSTEM, {"role": "user", "content": items}]

        inside = prepare(messages({"image": images[0]}, {"image": images[1]}))
        beside = prepare(messages({}, {}), images=images)
        assert torch.equal(inside.token_ids, beside.token_ids)
        assert [i.content_hash for i in inside.images] == [i.content_hash for i in beside.images]
        assert [i.num_tokens for i in inside.images] == [2 * 2, 1 * 11]
        assert inside.boundaries == beside.boundaries
        assert inside.boundaries[0] == len(rendered("Look well.", "")[0])

    def test_ready_inputs_are_the_same_prompt(self, prepare, picture):
        """As text with one placeholder an image, and as ids with all of them."""
        images = [picture(*size) for size in SIZES[:3]]
        text = "x<|image_pad|>" * 3
        expected = prepare(text, images=images)
        vision = VisionInputs(**tiny_processor().image_processor(images=images, return_tensors="pt"))
        for prompt in (prepare(text, vision=vision), prepare(expected.token_ids, vision=vision)):
            assert torch.equal(prompt.token_ids, expected.token_ids)
            assert torch.equal(prompt.positions, expected.positions)
            assert prompt.next_position == expected.next_position
            for ours, theirs in zip(prompt.images, expected.images, strict=True):
                assert ours.content_hash == theirs.content_hash
                assert (ours.start, ours.num_tokens) == (theirs.start, theirs.num_tokens)
                assert torch.equal(ours.pixel_values, theirs.pixel_values)
                assert torch.equal(ours.grid_thw, theirs.grid_thw)

    def test_inputs_without_any_image(self, prepare):
        empty = VisionInputs(torch.zeros(0, PATCH_DIM), torch.zeros(0, 3, dtype=torch.int64))
        assert prepare([1, 2], vision=empty).images == ()


class TestPositions:
    def test_by_hand(self, prepare):
        """2 rows of 3 tokens at position 3; text goes on at 3 + 3, then 3 rows of 1 token at 8, and the end."""
        ids = [1, 2, START, *[PAD] * 6, END, START, *[PAD] * 3]
        prompt = prepare(ids, vision=vision_inputs((1, 4, 6), (1, 6, 2)))
        assert prompt.positions.tolist() == [
            [0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7, 8, 8, 8],
            [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7, 8, 9, 10],
            [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8, 8, 8],
        ]
        assert prompt.next_position == 11

    @pytest.mark.parametrize("seed", range(5))
    def test_they_are_the_models(self, prepare, model, seed):
        """On the whole prompt, and one token later: where the completion goes on."""
        rng = np.random.default_rng(seed)
        grids = [(1, *(2 * rng.integers(1, 9, 2)).tolist()) for _ in range(rng.integers(1, 5))]
        ids: list[int] = rng.integers(0, 256, rng.integers(0, 4)).tolist()
        for _, height, width in grids:
            ids += [START, *[PAD] * (height * width // 4), END, *rng.integers(0, 256, rng.integers(0, 9)).tolist()]
        prompt = prepare(ids, vision=vision_inputs(*grids))
        batch = torch.tensor([[*ids, 1]])
        types = (batch == PAD).int()
        expected, _ = model.model.get_rope_index(batch, mm_token_type_ids=types, image_grid_thw=torch.tensor(grids))
        assert torch.equal(prompt.positions, expected[:, 0, :-1])
        assert [prompt.next_position] * 3 == expected[:, 0, -1].tolist()


ONE_IMAGE = vision_inputs((1, 4, 6))
REFUSED = {
    "nothing": (dict(prompt=[]), "expected text, chat messages or token ids, got list of length 0"),
    "no text": (dict(prompt=""), "got str of length 0"),
    "None": (dict(prompt=None), "got NoneType"),
    "bytes": (dict(prompt=b"abc"), "got bytes"),
    "no ids": (dict(prompt=torch.zeros(0, dtype=torch.int64)), "expected at least one token, got none (prompt)"),
    "floats": (dict(prompt=torch.zeros(3)), "expected integer ids [P], got torch.float32 [3] (prompt)"),
    "bools": (dict(prompt=torch.ones(3, dtype=torch.bool)), "expected integer ids [P], got torch.bool [3] (prompt)"),
    "complex": (dict(prompt=torch.ones(3, dtype=torch.complex64)), "expected integer ids [P], got torch.complex64"),
    "batch": (dict(prompt=torch.zeros(1, 3, dtype=torch.int64)), "expected integer ids [P], got torch.int64 [1, 3]"),
    "array of floats": (dict(prompt=np.zeros(3)), "expected integer ids [P], got float64 [3] (prompt)"),
    "array of strings": (dict(prompt=np.array(["a"])), "expected integer ids [P], got <U1 [1] (prompt)"),
    "other items": (dict(prompt=[1, "a"]), "expected token ids to be ints, got 'a' (prompt[1])"),
    "bool items": (dict(prompt=[True, 1]), "expected token ids to be ints, got True (prompt[0])"),
    "negative id": (dict(prompt=[1, -2, 999]), f"expected ids in [0, {VOCAB_SIZE}), got -2 (prompt)"),
    "large id": (dict(prompt=[1, VOCAB_SIZE]), f"expected ids in [0, {VOCAB_SIZE}), got {VOCAB_SIZE} (prompt)"),
    "video": (dict(prompt=[1, VIDEO]), f"expected no video placeholders, which are not supported, got id {VIDEO}"),
    "no role": (dict(prompt=[{"content": "a"}]), "expected messages with a role, got {'content': 'a'} (prompt)"),
    "no message": (dict(prompt=[USER, "a"]), "expected messages with a role, got 'a' (prompt)"),
    "long prefix": (dict(prompt=[1, 2], prefix_len=3), "expected at most the prompt's 2 tokens, got 3 (prefix_len)"),
    "images twice": (
        dict(prompt=[{"role": "user", "content": [{"type": "image", "image": "a.png"}]}], images=["b.png"]),
        "expected images in one place, got 1 in the messages and 1 in images (images)",
    ),
    "placeholder without image": (
        dict(prompt="<|image_pad|>"),
        "expected one placeholder an image, got 1 for 0 images",
    ),
    "image without placeholder": (dict(prompt="a", vision=ONE_IMAGE), "got 0 for 1 images (prompt)"),
    "patches": (
        dict(prompt=[PAD], vision=vision_inputs((1, 2, 2), pixel_values=torch.zeros(5, PATCH_DIM))),
        f"expected float [4, {PATCH_DIM}], got float32 [5, {PATCH_DIM}] (pixel_values)",
    ),
    "patch size": (
        dict(prompt=[PAD], vision=vision_inputs((1, 2, 2), pixel_values=torch.zeros(4, 99))),
        f"expected float [4, {PATCH_DIM}], got float32 [4, 99] (pixel_values)",
    ),
    "thin image": (dict(prompt="<|image_pad|>", images=[np.zeros((1, 300, 3), np.uint8)]), "aspect ratio"),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(prepare, fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare(**fields)


NOT_WITHOUT = {
    "text": (None, False, dict(prompt="a"), "expected token ids, because the engine has no tokenizer, got text"),
    "messages": (None, False, dict(prompt=[USER]), "expected token ids, because the engine has no tokenizer"),
    "images": ("tokenizer", True, dict(prompt="<|image_pad|>", images=["a.png"]), "the engine has no image processor"),
    "images of a text model": ("all", False, dict(prompt="a", images=["a.png"]), "no images for a text model, got 1"),
    "vision of a text model": ("all", False, dict(prompt=[1], vision=ONE_IMAGE), "no images for a text model, got Vis"),
}


@pytest.mark.parametrize(("processor", "vision", "fields", "message"), NOT_WITHOUT.values(), ids=NOT_WITHOUT)
def test_what_needs_a_part_that_is_not_there(model, processor, vision, fields, message):
    processor = {None: None, "tokenizer": tiny_processor().tokenizer, "all": tiny_processor()}[processor]
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare_with(processor, model if vision else None)(**fields)


def test_a_template_that_refuses():
    processor = tiny_processor()
    processor.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"the chat template accepts, got: roles must alternate \(prompt\)"):
        prepare_with(processor)([USER])


def test_a_processor_from_files(tmp_path, model, prepare, picture):
    for part in vars(tiny_processor()).values():
        part.save_pretrained(tmp_path)
    text, image = "a<|image_pad|>", picture(60, 90)
    ours, theirs = (
        prepare_with(load_processor(tmp_path, True), model)(text, images=[image]),
        prepare(text, images=[image]),
    )
    assert torch.equal(ours.token_ids, theirs.token_ids)
    assert torch.equal(ours.vision.pixel_values, theirs.vision.pixel_values)
    assert load_processor(tmp_path, False).image_processor is None
