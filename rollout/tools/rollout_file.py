"""Files of rollouts: one JSON line a rollout, and what is read of a file that was left unfinished.

The rows of a prompt stand together, sample 0 first; prompts stand in the order in which they finished. Beside
`NAME.jsonl` stand `NAME.run.json`, the settings the rows were made with, and, where lines failed,
`NAME.errors.jsonl`. docs/rollout_format.md says what each key means.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from foveate.rollout.checks import require
from foveate.rollout.tools.prompts import BadLine, fingerprint
from foveate.rollout.types import KeepPlan, RolloutGroup


def rows_of(group: RolloutGroup) -> list[dict[str, Any]]:
    """One dict a rollout; float32 values become the doubles equal to them, so that they are read back exactly."""
    prompt_hash, keep = fingerprint(group.request), _keep_of(group.keep)
    return [
        {
            "id": group.request_id,
            "sample": index,
            "n": group.request.n,
            "text": rollout.text,
            "token_ids": rollout.token_ids.tolist(),
            "logprobs": rollout.logprobs.tolist(),
            "log_kept": rollout.log_kept.tolist(),
            "entropy": rollout.entropy.tolist(),
            "finish_reason": rollout.finish_reason,
            "stop_token_id": rollout.stop_token_id,
            "weight_version": rollout.weight_versions[-1][2] if rollout.weight_versions else None,
            "seed": group.request.sampling.seed,
            "prompt_tokens": len(group.prompt_ids),
            "prompt_hash": prompt_hash,
            "keep": keep,
        }
        for index, rollout in enumerate(group.rollouts)
    ]


def _keep_of(plan: KeepPlan | None) -> dict[str, Any] | None:
    """A plan without its positions, which follow from the prompt and what is kept of it."""
    if plan is None:
        return None
    fields = {name: value for name, value in vars(plan).items() if name != "positions"}
    sites = [{name: _as_list(value) for name, value in vars(site).items()} for site in plan.sites]
    return {**fields, "sites": sites}


def _as_list(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else value


@dataclass
class RolloutFile:
    """A file of rollouts that grows by whole prompts. finished: id -> prompt_hash of those that are in it."""

    path: Path
    finished: dict[str, str] = field(default_factory=dict)
    _end: int = 0  # bytes up to the end of the last complete prompt

    @property
    def settings_path(self) -> Path:
        return self.path.with_suffix(".run.json")

    @property
    def errors_path(self) -> Path:
        return self.path.with_suffix(".errors.jsonl")

    @property
    def paths(self) -> tuple[Path, ...]:
        """All that is written to."""
        return self.path, self.settings_path, self.errors_path

    def check(self, settings: dict[str, Any], overwrite: bool) -> bool:
        """Reads what is there, changing nothing; returns whether `open` begins anew.

        So it does with `overwrite` and where there are no rows: no file, or an empty one. Else `finished` holds the
        complete prompts. Raises ValueError if the file was made with other settings, naming the first, or holds
        something else.
        """
        require(self.path.suffix == ".jsonl", "a file name that ends with .jsonl", str(self.path), "output")
        if overwrite or not self.path.exists() or self.path.stat().st_size == 0:
            return True
        self._compare(settings)
        self._read()
        return False

    def open(self, settings: dict[str, Any], overwrite: bool) -> None:
        """Begins the file, or goes on with it: complete prompts are kept, what a killed run left half is cut off.

        Raises what `check` raises, before anything is changed.
        """
        anew = self.check(settings, overwrite)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.errors_path.unlink(missing_ok=True)
        if not anew:
            os.truncate(self.path, self._end)
            return
        # Wherever it is killed, no rows stand beside settings that are not theirs.
        self.path.write_bytes(b"")
        fresh = self.settings_path.with_suffix(".json.tmp")
        fresh.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        fresh.replace(self.settings_path)

    def write(self, group: RolloutGroup) -> None:
        """Appends the rows of one prompt; they are with the operating system when this returns."""
        lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows_of(group)]
        with self.path.open("ab") as file:  # what UTF-8 cannot hold, JSON escapes the way Python does
            file.write("".join(lines).encode("utf-8", "backslashreplace"))

    def write_error(self, bad: BadLine) -> None:
        """Appends a line to the file of errors, which is of the last run alone."""
        row = {"line": bad.line, "id": bad.id, "error": bad.reason}
        with self.errors_path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _compare(self, settings: dict[str, Any]) -> None:
        way_out = "another --output, or --overwrite"
        require(self.settings_path.is_file(), f"{self.settings_path} beside it, {way_out}", str(self.path), "output")
        try:
            old = dict(json.loads(self.settings_path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"expected settings in {self.settings_path}, {way_out}, got {error} (output)") from error
        for name in dict.fromkeys([*settings, *old]):
            same = old.get(name) == settings.get(name)
            expected = f"{old.get(name)!r}, with which {self.path} was begun, {way_out}"
            require(same, expected, settings.get(name), name)

    def _read(self) -> None:
        """Fills `finished` and finds where the last complete prompt ends."""
        self._end = place = 0
        self.finished.clear()
        expected = ("", 0)  # id and sample of the next row, any id at sample 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break  # torn: its writer was killed
                row = self._row(line, number)
                name, sample, prompt = row["id"], row["sample"], row["prompt_hash"]
                follows = (expected[1] == sample == 0 and name not in self.finished) or expected == (name, sample)
                require(follows, f"sample {expected[1]} of a prompt", f"sample {sample}", f"line {number}, {self.path}")
                place += len(line)
                expected = (name, sample + 1)
                if sample + 1 == row["n"]:
                    self.finished[name], self._end, expected = prompt, place, ("", 0)

    def _row(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
            row["id"], row["sample"], row["n"], row["prompt_hash"]
        except (ValueError, KeyError, TypeError) as error:
            got = line[:60].decode("utf-8", "replace")
            raise ValueError(f"expected a rollout, got {got!r} (line {number}, {self.path})") from error
        return row
