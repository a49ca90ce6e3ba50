"""The command `foveate`: finds what the first word names and hands over the rest."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec

DESCRIPTION = """Foveate, a rollout engine for multimodal GRPO.

`foveate COMMAND --help` shows the options of a command. The library itself is used from Python: `import foveate`."""


@dataclass(frozen=True)
class Command:
    """A command, whose module has `main(arguments) -> exit status`.

    needs: what it imports beyond the package's own dependencies, and what that is called on the package index.
    extra: the extra of foveate that brings these.
    """

    summary: str
    module: str
    needs: dict[str, str] = field(default_factory=dict)
    extra: str = ""

    @property
    def missing(self) -> list[str]:
        """Packages to be installed first."""
        return [package for module, package in self.needs.items() if find_spec(module) is None]


TYRO = {"tyro": "tyro"}
PIL = {"PIL": "pillow"}
DEMO = {"PIL": "pillow", "math_verify": "math-verify", "scipy": "scipy", "sklearn": "scikit-learn"}
COMMANDS = {
    "doctor": Command(
        "what is installed, which kernels run, and whether they are right", "foveate.rollout.tools.doctor"
    ),
    "demo": Command(
        "a tiny vision-language model learns to read digits", "foveate.rollout.demo.command", DEMO | TYRO, "demo"
    ),
    "rollout": Command(
        "a file of prompts in, rollouts with their log-probs out", "foveate.rollout.tools.rollout", TYRO, "rollout"
    ),
    "prune-view": Command(
        "which patches of an image pruning keeps", "foveate.rollout.tools.prune_view", PIL | TYRO, "rollout"
    ),
    "train": Command("GRPO on your own model and data", "foveate.rollout.tools.train", TYRO, "train"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that `arguments` name (None: those of the process) and returns the exit status.

    Unknown commands and options, and values that make no sense, end the process with status 2 and say why; an
    interrupt (Ctrl-C) is status 130.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    if not given:
        parser.error(f"expected a command, one of {', '.join(COMMANDS)}")
    name = parser.parse_args(given[:1]).command
    command = COMMANDS[name]
    if missing := command.missing:
        hint = f"pip install 'foveate[{command.extra}]'"
        print(f"foveate: expected {', '.join(missing)} to be installed: {hint}", file=sys.stderr)
        return 1
    try:
        return importlib.import_module(command.module).main(given[1:])
    except KeyboardInterrupt:
        print(f"\nfoveate {name}: stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    lines = [f"  {name:<11} {command.summary}" for name, command in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="foveate",
        description="\n".join([DESCRIPTION, "", "commands:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="foveate COMMAND [OPTIONS]",
    )
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="one of the above")
    return parser
