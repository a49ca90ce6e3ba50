"""Pruners: one short file a method, found by name."""

from __future__ import annotations

from foveate.rollout.pruners.divprune import DivPrune
from foveate.rollout.pruners.fastv import FastV
from foveate.rollout.pruners.protocol import EncoderPruner, LayerPruner
from foveate.rollout.pruners.pyramiddrop import PyramidDrop
from foveate.rollout.pruners.random import RandomPruner
from foveate.rollout.pruners.strided import StridedPruner
from foveate.rollout.pruners.visionzip import VisionZip
from foveate.rollout.pruning import PruneConfig

PRUNERS: dict[str, type[EncoderPruner] | type[LayerPruner]] = {
    "random": RandomPruner,
    "strided": StridedPruner,
    "visionzip": VisionZip,
    "divprune": DivPrune,
    "fastv": FastV,
    "pyramiddrop": PyramidDrop,
}


def pruner_of(config: PruneConfig) -> EncoderPruner | LayerPruner:
    """The pruner of a configuration; `site` says of which kind."""
    return PRUNERS[config.method](config)


def encoder_pruner_of(config: PruneConfig) -> EncoderPruner:
    """The pruner of a configuration whose site is the encoder."""
    pruner = pruner_of(config)
    assert pruner.site == "encoder", config.method
    return pruner
