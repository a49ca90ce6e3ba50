"""`foveate rollout`: a file of prompts in, a file of rollouts out."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from foveate.rollout.checks import require
from foveate.rollout.config import EngineConfig, SamplingParams
from foveate.rollout.engine import Engine
from foveate.rollout.progress import without_transformers_bars
from foveate.rollout.resumption import pruning_of
from foveate.rollout.tools.command_line import parse
from foveate.rollout.tools.prompts import BadLine, Defaults, count_lines, fingerprint, read_requests
from foveate.rollout.tools.reporting import Reporter
from foveate.rollout.tools.rollout_file import RolloutFile
from foveate.rollout.types import Request, RolloutGroup


@dataclass(frozen=True)
class RolloutOptions:
    """Completes every prompt of a file n times and writes tokens, log-probs and entropies as JSON lines.

    Stopped at any moment, the same command goes on where it was: finished prompts are kept. Lines that fail are
    listed in a file of errors beside the output, everything else is done, and the exit status is 1.
    """

    model: str
    """Folder or Hugging Face name of a model with its tokenizer; weights from safetensors."""
    data: Path
    """Prompts: .jsonl, one object a line (id, prompt, images, ...), or .parquet with such columns."""
    output: Path = Path("rollouts.jsonl")
    """Rollouts; NAME.run.json and NAME.errors.jsonl are written beside it."""
    n: int = 8
    """Samples of each prompt."""
    seed: int = 0
    """Of the noise; a prompt's own follows from this and its id."""
    system: str | None = None
    """System message of prompts that bring none."""
    image_root: Path | None = None
    """Folder that relative image paths start from; left out, that of the data."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights; auto is that of the checkpoint."""
    overwrite: bool = False
    """Begin anew instead of going on with an output that is there."""
    allow_errors: bool = False
    """Exit with 0 although lines failed."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        require(self.n >= 1, "an int >= 1", self.n, "--n")
        require(self.sampling.seed is None, "the seed in --seed", self.sampling.seed, "--sampling.seed")
        require(self.output.suffix == ".jsonl", "a file name that ends with .jsonl", str(self.output), "--output")
        require(self.data.is_file(), "a file", str(self.data), "--data")
        for path in RolloutFile(self.output).paths:
            same = path.exists() and path.samefile(self.data)
            require(not same, f"another file than {path}, which is written to", str(self.data), "--data")

    @property
    def settings(self) -> dict[str, Any]:
        """What the rollouts depend on beside the data: an output is only continued with the same."""
        sampling = {f"sampling.{name}": value for name, value in asdict(self.sampling).items()}
        names = ("dtype", "max_context", "ban_vision_tokens", "deterministic")
        engine = {f"engine.{name}": getattr(self.engine, name) for name in names}
        engine["engine.prune"] = pruning_of(self.engine.prune)
        own = {name: getattr(self, name) for name in ("model", "n", "seed", "system", "dtype")}
        return {name: _plain(value) for name, value in {**own, **sampling, **engine}.items()}


def main(arguments: Sequence[str]) -> int:
    """Returns 0, or 1 if lines failed (or an error of the user's was met on the way; it is printed)."""
    options = parse(RolloutOptions, "foveate rollout", arguments)
    try:
        return run(options)
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        print(f"foveate rollout: {error}", file=sys.stderr)
        return 1


def run(options: RolloutOptions, engine: Engine | None = None) -> int:
    """Writes the rollouts of all prompts that are not in the output yet. engine: None loads the options' model."""
    file = RolloutFile(options.output)
    anew = file.check(options.settings, options.overwrite)
    total = count_lines(options.data)
    if anew and file.path.exists() and file.path.stat().st_size > 0:
        _require_prompts(options)
    if file.finished:
        print(f"{options.output}: {len(file.finished)} prompts are there already", file=sys.stderr)
    engine = engine or load_engine(options.model, options.dtype, options.engine)
    file.open(options.settings, options.overwrite)  # only now: nothing is lost to a model or data that are not there
    with Reporter(max(total - len(file.finished), 0)) as report:
        for done in _complete(engine, options, file):
            if isinstance(done, RolloutGroup):
                file.write(done)
                report.add(len(done.rollouts), sum(len(rollout.token_ids) for rollout in done.rollouts))
            else:
                file.write_error(done)
                report.add(0, 0, failed=True)
                report.say(f"{options.data}, line {done.line}: {done.reason}")
    print(f"{report.line}; rollouts: {options.output}")
    if report.errors:
        print(f"{report.errors} lines failed: {file.errors_path}")
    return int(report.errors > 0 and not options.allow_errors)


def load_engine(model: str, dtype: str, config: EngineConfig) -> Engine:
    """An engine over a saved model, on config.device (None: cuda if there is one)."""
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    with without_transformers_bars():
        return Engine.from_pretrained(model, replace(config, device=device), dtype=kind)


def _complete(engine: Engine, options: RolloutOptions, file: RolloutFile) -> Iterator[RolloutGroup | BadLine]:
    """Feeds the engine so that it is never idle and a long file never waits in memory."""
    lines: dict[str, int] = {}  # of the requests in the engine
    waiting, work = 0, _unfinished(options, file)
    item = next(work, None)
    while item is not None or engine.has_unfinished:
        while item is not None and waiting <= 2 * engine.config.max_sequences:
            if isinstance(item, BadLine):
                yield item
            else:
                number, request = item
                try:
                    lines[engine.add_request(request)] = number
                    waiting += request.n
                except ValueError as error:
                    yield BadLine(number, str(error), request.request_id)
            item = next(work, None)
        for group in engine.step():
            waiting -= group.request.n
            number = lines.pop(group.request_id)
            yield group if group.error is None else BadLine(number, str(group.error), group.request_id)


def _read(options: RolloutOptions) -> Iterator[tuple[int, Request] | BadLine]:
    defaults = Defaults(options.n, options.seed, options.sampling, options.system, options.image_root)
    return read_requests(options.data, defaults)


def _require_prompts(options: RolloutOptions) -> None:
    """Raises ValueError unless a line of the data makes a request: a wrong file must not replace an output."""
    first: BadLine | None = None
    for item in _read(options):
        if not isinstance(item, BadLine):
            return
        first = first or item
    got = "an empty file" if first is None else f"line {first.line}: {first.reason}"
    raise ValueError(f"expected a prompt before {options.output} is overwritten, got {got} ({options.data})")


def _unfinished(options: RolloutOptions, file: RolloutFile) -> Iterator[tuple[int, Request] | BadLine]:
    """What is left to do of the data."""
    for item in _read(options):
        if isinstance(item, BadLine) or (name := str(item[1].request_id)) not in file.finished:
            yield item
        elif file.finished[name] != fingerprint(item[1]):
            reason = (
                f"expected the prompt that {file.path} has under this id, got another: use another id or --overwrite"
            )
            yield BadLine(item[0], reason, name)


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    if isinstance(value, tuple):
        return list(value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
