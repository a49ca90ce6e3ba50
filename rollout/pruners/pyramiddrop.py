"""PyramidDrop: at several layers, each time by the attention of the prompt's last token."""

from __future__ import annotations

from typing import ClassVar, Literal

from foveate.kernels.dispatch import require
from foveate.rollout.pruners.protocol import Stage
from foveate.rollout.pruning import PruneConfig


class PyramidDrop:
    """Qwen port of PyramidDrop (Xing et al., arXiv 2410.17247).

    At each stage the score of an image token that is still there is the softmax attention that the last instruction
    token pays to it by the queries and keys of the layer that comes next, mean over heads; that layer already runs
    without what is dropped. A rollout's prompt ends where the completion begins, so the last instruction token is the
    prompt's last one. Kept tokens keep their positions (the authors renumber them). Each image keeps its own share.
    """

    site: ClassVar[Literal["layer"]] = "layer"

    def __init__(self, config: PruneConfig) -> None:
        self.layers, self.ratios, self.keep = config.options["layers"], config.options["ratios"], config.keep

    def stages(self, num_layers: int) -> tuple[Stage, ...]:
        layers = self.layers
        if layers is None:
            require(num_layers >= 4, "a decoder of at least 4 layers, or layers", num_layers, "prune.layers")
            layers = tuple(num_layers * quarter // 4 for quarter in (1, 2, 3))
        require(layers[-1] < num_layers, f"layers from 1 to {num_layers - 1}", layers, "prune.layers")
        ratios = self.ratios or tuple(self.keep ** (stage + 1) for stage in range(len(layers)))
        return tuple(Stage(layer, ratio, "within") for layer, ratio in zip(layers, ratios, strict=True))
