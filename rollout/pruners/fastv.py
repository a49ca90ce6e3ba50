"""FastV: once, early in the decoder, by the attention of the prompt's last token."""

from __future__ import annotations

from typing import ClassVar, Literal

from foveate.kernels.dispatch import require
from foveate.rollout.pruners.protocol import Stage
from foveate.rollout.pruning import PruneConfig


class FastV:
    """Qwen port of FastV (Chen et al., arXiv 2403.06764).

    The score of an image token is the softmax attention that the prompt's last token pays to it in layer K - 1, mean
    over heads; layers from K on see of each image the tokens with the largest scores. Kept tokens keep their positions.
    The authors' code scores one image; with several, each keeps its own share.
    """

    site: ClassVar[Literal["layer"]] = "layer"

    def __init__(self, config: PruneConfig) -> None:
        self.layer, self.keep = config.options["layer"], config.keep

    def stages(self, num_layers: int) -> tuple[Stage, ...]:
        require(self.layer < num_layers, f"a layer from 1 to {num_layers - 1}", self.layer, "prune.layer")
        return (Stage(self.layer, self.keep, "before"),)
