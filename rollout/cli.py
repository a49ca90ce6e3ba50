"""The command `foveate`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec

DESCRIPTION = """Foveate, a rollout engine for multimodal GRPO.

`foveate doctor` reports what is installed, which kernels run and whether they are right.
`foveate COMMAND --help` shows the options of a command. The library itself is used from Python: `import foveate`."""
# What the demo imports beyond the package's own dependencies, and what it is called on the package index.
DEMO_PACKAGES = {
    "PIL": "pillow",
    "math_verify": "math-verify",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "tyro": "tyro",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that `arguments` name (None: those of the process) and returns the exit status.

    Unknown commands and options, and values that make no sense, end the process with status 2 and say why.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["doctor"]:  # works with nothing but the package itself
        from foveate.rollout.tools.doctor import main as doctor

        return doctor(given[1:])
    missing = [package for module, package in DEMO_PACKAGES.items() if find_spec(module) is None]
    if missing:
        print(f"foveate: expected {', '.join(missing)} to be installed: pip install 'foveate[demo]'", file=sys.stderr)
        return 1
    import tyro

    from foveate.rollout.demo.options import DemoOptions

    options = tyro.extras.subcommand_cli_from_dict(
        {"demo": DemoOptions},
        prog="foveate",
        description=DESCRIPTION,
        args=given,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    from foveate.rollout.demo.recipe import run_demo

    try:
        run_demo(options)
    except KeyboardInterrupt:
        print("\nfoveate demo: stopped", file=sys.stderr)
        return 130
    return 0
