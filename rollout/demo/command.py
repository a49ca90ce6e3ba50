"""`foveate demo`."""

from __future__ import annotations

from collections.abc import Sequence

import tyro

from foveate.rollout.demo import recipe
from foveate.rollout.demo.options import DemoOptions


def main(arguments: Sequence[str]) -> int:
    """Runs the demo; wrong options end the process with status 2 and say why."""
    options = tyro.cli(DemoOptions, prog="foveate demo", args=arguments, config=(tyro.conf.FlagCreatePairsOff,))
    recipe.run_demo(options)
    return 0
