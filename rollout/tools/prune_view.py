"""`foveate prune-view`: which patches of images each pruning method keeps, drawn over the images."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, ImageDraw, ImageFont

from foveate.rollout.checks import require
from foveate.rollout.config import EngineConfig, PruneConfig, SamplingParams
from foveate.rollout.engine import Engine
from foveate.rollout.images import load_image
from foveate.rollout.processor import Processor
from foveate.rollout.pruning import LAYER_METHODS, METHODS
from foveate.rollout.tools.command_line import parse
from foveate.rollout.tools.rollout import load_engine
from foveate.rollout.types import Request, RolloutGroup, SiteKeep

WIDTH, HEIGHT = 340, 510  # pixels, of the largest picture
GAP, LINE = 18, 20  # pixels, between pictures and of a line of text
KV_MEMORY = 1 << 30  # bytes, of one prompt; several engines stand side by side
ACROSS = 5  # pictures side by side
PAGE, INK, SOFT = (246, 247, 249), (22, 32, 44), (90, 102, 117)
DROPPED, KEPT, MERGED = (58, 68, 82), (31, 111, 235), (217, 115, 13)


@dataclass(frozen=True)
class ViewOptions:
    """Draws what pruning keeps of images: a row for each image, a picture for each method and site.

    Dropped patches are dark; the others stand as they are, with a blue line around them and an orange frame where
    others were merged into them. Before the language model: random, strided, visionzip, divprune. Inside it, with a
    picture for each layer that drops: fastv, pyramiddrop.
    """

    model: str
    """Folder or Hugging Face name of a vision-language model; weights from safetensors."""
    images: tuple[Path, ...]
    """Files with images; they stand in one prompt, before the question."""
    question: str = "What do you see?"
    """Methods inside the language model select by what is asked."""
    methods: tuple[str, ...] = ("random", "visionzip", "divprune", "fastv")
    """Some of random, strided, visionzip, divprune, fastv, pyramiddrop."""
    keep: float = 0.5
    """Share of the image tokens that is kept; of pyramiddrop, what each stage leaves of what the one before left."""
    layers: tuple[int, ...] = ()
    """First decoder layer without what fastv drops (default 2), or those of pyramiddrop's stages (default three)."""
    output: Path = Path("prune_view.png")
    """A .png file, which is replaced."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights; auto is that of the checkpoint."""

    def __post_init__(self) -> None:
        require(len(self.images) > 0, "an image or more", self.images, "--images")
        unknown = [method for method in self.methods if method not in METHODS]
        require(len(self.methods) > 0 and not unknown, f"some of {', '.join(METHODS)}", self.methods, "--methods")
        require(self.output.suffix == ".png", "a file name that ends with .png", str(self.output), "--output")
        _ = self.configs  # whose values are checked

    @property
    def configs(self) -> list[PruneConfig]:
        return [PruneConfig(method, self.keep, **self._sites(method)) for method in self.methods]

    def _sites(self, method: str) -> dict[str, Any]:
        if not self.layers or method not in LAYER_METHODS:
            return {}
        if method == "fastv":
            require(len(self.layers) == 1, "one layer for fastv", self.layers, "--layers")
            return {"layer": self.layers[0]}
        return {"layers": self.layers}


def main(arguments: Sequence[str]) -> int:
    """Returns 0, or 1 if an error of the user's was met on the way; it is printed."""
    options = parse(ViewOptions, "foveate prune-view", arguments)
    try:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        pictures = [load_image(str(path), "--images") for path in options.images]
        engine = load_engine(options.model, options.dtype, EngineConfig(kv_memory=KV_MEMORY))
        draw(engine, pictures, options.question, options.configs).save(options.output)
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        print(f"foveate prune-view: {error}", file=sys.stderr)
        return 1
    print(f"{_count(pictures, 'image')}, {_count(options.methods, 'method')}: {options.output}")
    return 0


def _count(things: Sequence[object], name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def draw(engine: Engine, pictures: Sequence[Image.Image], question: str, configs: Sequence[PruneConfig]) -> Image.Image:
    """A sheet with a row for each picture and, after the picture itself, a column for each configuration and site.

    engine: gives the model, the processor and every setting but pruning; engines of their own share its weights.
    Raises ValueError for what a configuration or a picture does not allow, naming it.
    """
    columns = [[("the image", picture) for picture in pictures]]
    for config in configs:
        try:
            group = plan_for(engine, pictures, question, config)
        except ValueError as error:
            raise ValueError(f"{config.method}: {error}") from error
        for site in sites_of(group):
            columns.append(
                [(_title(config, site, i), overlay(pictures[i], group, site, i)) for i in range(len(pictures))]
            )
    parts = [_part(columns[start : start + ACROSS]) for start in range(0, len(columns), ACROSS)]
    sheet = Image.new("RGB", (parts[0].width, sum(part.height for part in parts)), PAGE)
    for index, part in enumerate(parts):
        sheet.paste(part, (0, sum(above.height for above in parts[:index])))
    return sheet


def plan_for(engine: Engine, pictures: Sequence[Image.Image], question: str, config: PruneConfig) -> RolloutGroup:
    """The group of a prompt of pictures and a question, pruned; one token is drawn."""
    user: list[dict[str, Any]] = [*({"type": "image"} for _ in pictures), {"type": "text", "text": question}]
    prompt = [{"role": "user", "content": user}]
    request = Request(prompt, images=pictures, sampling=SamplingParams(max_tokens=1), request_id=config.method)
    (group,) = with_pruning(engine, config).generate([request], strict=True)
    return group


def with_pruning(engine: Engine, config: PruneConfig) -> Engine:
    """An engine of its own over the same weights, with every setting but pruning the same."""
    processor = Processor(engine.tokenizer, engine.image_processor)
    return Engine(engine.model, processor, replace(engine.config, prune=config))


def sites_of(group: RolloutGroup) -> tuple[SiteKeep, ...]:
    """The sites of a group's plan."""
    assert group.keep is not None, group.request_id
    return group.keep.sites


def kept_patches(group: RolloutGroup, site: SiteKeep, index: int) -> torch.Tensor:
    """int64 [height, width] of merged tokens of an image's first frame: 0 dropped, 1 kept, 2 kept and merged into."""
    assert group.image_grid_thw is not None, group.request_id
    frames, height, width = group.image_grid_thw[index].tolist()
    size = int(site.num_tokens[index])
    merge = round((frames * height * width / size) ** 0.5)
    start, stop = site.kept_offsets[index : index + 2].tolist()
    marks = torch.zeros(size, dtype=torch.int64, device="cpu")
    kinds = torch.ones(stop - start, dtype=torch.int64, device="cpu")
    if site.merge_offsets is not None:
        kinds += (site.merge_offsets.diff()[start:stop] > 0).long()
    marks[site.kept[start:stop].long()] = kinds
    return marks.view(frames, height // merge, width // merge)[0]


def overlay(picture: Image.Image, group: RolloutGroup, site: SiteKeep, index: int) -> Image.Image:
    """The picture with its dropped patches darkened, a line around the others, and frames where they absorbed some."""
    marks = kept_patches(group, site, index)
    shown = _sized(picture)
    dark = Image.blend(shown, Image.new("RGB", shown.size, DROPPED), 0.82)
    pen = ImageDraw.Draw(dark)
    for row, column in marks.nonzero().tolist():
        box = _cell(shown.size, marks.shape, row, column)
        if box[0] < box[2] and box[1] < box[3]:
            dark.paste(shown.crop(box), box[:2])
            _frame(pen, box, marks, row, column)
    return dark


def _cell(size: tuple[int, int], shape: Sequence[int], row: int, column: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom in pixels."""
    left, right = (size[0] * at // shape[1] for at in (column, column + 1))
    top, bottom = (size[1] * at // shape[0] for at in (row, row + 1))
    return left, top, right, bottom


def _frame(
    pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int], marks: torch.Tensor, row: int, column: int
) -> None:
    left, top, right, bottom = box[0], box[1], box[2] - 1, box[3] - 1
    if marks[row, column] == 2:
        pen.rectangle((left, top, right, bottom), outline=MERGED, width=2)
        return
    edges = {
        (row - 1, column): (left, top, right, top),
        (row + 1, column): (left, bottom, right, bottom),
        (row, column - 1): (left, top, left, bottom),
        (row, column + 1): (right, top, right, bottom),
    }
    for (beside, next_to), line in edges.items():
        inside = 0 <= beside < marks.shape[0] and 0 <= next_to < marks.shape[1]
        if not inside or not marks[beside, next_to]:
            pen.line(line, fill=KEPT)


def _title(config: PruneConfig, site: SiteKeep, index: int) -> str:
    place = "before the language model" if site.kind == "encoder" else f"from layer {site.layer} on"
    start, stop = site.kept_offsets[index : index + 2].tolist()
    return f"{config.method}, {place}\n{stop - start} of {int(site.num_tokens[index])} tokens"


def _sized(picture: Image.Image) -> Image.Image:
    """In RGB and as large as the sheet has room for."""
    scale = min(WIDTH / picture.width, HEIGHT / picture.height)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _part(columns: Sequence[Sequence[tuple[str, Image.Image]]]) -> Image.Image:
    """columns: titles and pictures, from the top; a row is as high as its highest picture."""
    shown = [[(title, _sized(picture)) for title, picture in column] for column in columns]
    heights = [max(column[row][1].height for column in shown) for row in range(len(shown[0]))]
    head = 2 * LINE + GAP // 2
    size = (GAP + len(shown) * (WIDTH + GAP), GAP + sum(height + head + GAP for height in heights))
    sheet = Image.new("RGB", size, PAGE)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for place, column in enumerate(shown):
        left, top = GAP + place * (WIDTH + GAP), GAP
        for (title, picture), height in zip(column, heights, strict=True):
            for number, words in enumerate(title.split("\n")):
                pen.text((left, top + number * LINE), words, fill=SOFT if number else INK, font=font)
            sheet.paste(picture, (left, top + head))
            top += height + head + GAP
    return sheet
