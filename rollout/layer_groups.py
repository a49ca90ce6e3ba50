"""Layer groups: runs of decoder layers that hold the same tokens of a prompt, and how pages hold them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from foveate.rollout.checks import require
from foveate.rollout.pruners import pruner_of
from foveate.rollout.pruners.protocol import Stage
from foveate.rollout.pruning import PruneConfig

MAX_GROUPS = 8


@dataclass(frozen=True)
class LayerGroups:
    """A decoder's layers, cut where image tokens are dropped.

    stages[g - 1] drops what group g no longer holds. A page holds `layers_per_page` consecutive layers, the greatest
    common divisor of the groups' sizes, so that one pool of pages serves all groups; those layers are a block, and a
    segment has one table of pages a group, of a row a block. Without stages there are one group and one block.
    """

    num_layers: int
    stages: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        layers = [0, *(stage.layer for stage in self.stages), self.num_layers]
        ascending = all(a < b for a, b in pairwise(layers))
        require(ascending, f"ascending layers from 1 to {self.num_layers - 1}", layers[1:-1], "layers")
        require(len(self.stages) < MAX_GROUPS, f"at most {MAX_GROUPS - 1} stages", len(self.stages), "layers")

    @property
    def count(self) -> int:
        """Groups."""
        return len(self.stages) + 1

    @cached_property
    def layers(self) -> tuple[range, ...]:
        """The layers of each group."""
        starts = [0, *(stage.layer for stage in self.stages)]
        return tuple(range(a, b) for a, b in zip(starts, [*starts[1:], self.num_layers], strict=True))

    @cached_property
    def layers_per_page(self) -> int:
        """Layers whose keys and values one page holds."""
        return math.gcd(*map(len, self.layers))

    @cached_property
    def blocks(self) -> tuple[range, ...]:
        """The blocks of each group; block b holds the layers from b * layers_per_page on."""
        size = self.layers_per_page
        return tuple(range(layers.start // size, layers.stop // size) for layers in self.layers)

    @cached_property
    def num_blocks(self) -> int:
        """Blocks of all groups."""
        return self.num_layers // self.layers_per_page


ONE_GROUP = LayerGroups(1)


def layer_groups(config: PruneConfig | None, num_layers: int) -> LayerGroups:
    """The groups of a decoder under an engine's pruning. Raises ValueError for layers that it lacks."""
    pruner = None if config is None else pruner_of(config)
    if pruner is None or pruner.site == "encoder":
        return LayerGroups(num_layers)
    return LayerGroups(num_layers, pruner.stages(num_layers))
