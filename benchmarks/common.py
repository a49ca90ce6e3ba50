"""Measures kernels: checked, timed beside their peers, checked again, and set against this machine's best.

A benchmark lists its measurements and hands them to `main`, which writes one JSONL row for each backend:

    us, us_p20, us_p80     microseconds of a call: median, 20th and 80th percentile of the samples
    gb_s, tflop_s          the floor's bytes and operations over the median
    floor_us               the larger of bytes / bandwidth and operations / rate of this machine, measured in this run
    share_of_floor         floor_us / us; above 1 `faster_than_floor` is set: bytes were not counted, work was skipped,
                           or a cache served
    peak_bytes             on a GPU, by name of the kernel and its peers: what a call allocates at most at a time
    peer_us, ratio         of each peer: its median, and how many times longer than the kernel it takes
    host_syncs             by name, what made the host wait for the device in a burst of BURST calls; on the CPU, what
                           would on a GPU
    captured               the time is of a replayed CUDA graph; `unlike_peers` are those of which the contrary holds
    tainted                it is not, because an earlier capture failed, after which a process can capture no more

A kernel that raises, or whose result is wrong before or after it was timed, has no row, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from compare import compare, name_of, read_rows
from host_syncs import watch
from machine import Ceilings, environment, measure_ceilings
from measurement import Measurement, verify
from samplers import Inputs, Run, Sampler
from timing import FULL, QUICK, Timer, Timing, bytes_of

from foveate.kernels.dispatch import available

BURST = 8
PEER = "peer "  # before its name, which may be that of a backend
CHECKS = 2  # fresh inputs each: one that a kernel remembers does not pass for another
Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What every benchmark is told on its command line."""

    device: torch.device
    quick: bool = False
    filter: str = ""
    output: Path | None = None
    compare: Path | None = None

    def selects(self, row: Row) -> bool:
        return re.search(self.filter, name_of(row)) is not None


def backends_of(family: str, device: torch.device) -> list[str]:
    """What is worth measuring there: Triton's interpreter, which stands in for a GPU in proofs, is not."""
    return [name for name in available(family, device) if name != "triton" or device.type == "cuda"]


class Harness:
    """Measures one after another; `refusals` says what has no row, and why."""

    def __init__(self, timer: Timer, ceilings: Ceilings, quick: bool = False) -> None:
        self.timer, self.ceilings, self.quick = timer, ceilings, quick
        self.generator = torch.Generator(timer.device).manual_seed(0)
        self.refusals: list[str] = []

    def measure(self, measurement: Measurement) -> list[Row]:
        """A row for each backend whose results are right."""
        fresh = partial(measurement.make_inputs, self.generator)
        checks = [fresh() for _ in range(CHECKS)]
        backends = self._passing(measurement, measurement.backends, checks)
        if not backends:
            return []
        peers = measurement.peers
        if measurement.check_peers:
            peers = self._passing(measurement, peers, checks, peer=True)
        num_sets = self.timer.num_sets(bytes_of(checks[0]) + measurement.floor.writes)
        input_sets = [*checks, *(fresh() for _ in range(num_sets - CHECKS))]
        originals = [measurement.original(inputs) for inputs in input_sets]
        syncs: dict[str, dict[str, int]] = {}
        for name, run in backends.items():
            with self._refusing(measurement, name):
                syncs[name] = self._host_syncs(run, input_sets)
        contenders = {**{f"{PEER}{name}": run for name, run in peers.items()}, **{n: backends[n] for n in syncs}}
        timings = self.timer.measure(
            contenders,
            input_sets,
            eager=frozenset(name for name, found in syncs.items() if found),
            check=partial(self._check_again, measurement, originals),
            refuse=partial(self._refuse, measurement),
        )
        timed = {name.removeprefix(PEER): run for name, run in contenders.items() if name in timings}
        peaks = self._peaks(timed, input_sets[0])
        beside = {name: timings[f"{PEER}{name}"] for name in peers if f"{PEER}{name}" in timings}
        rows = (self._row(measurement, name, timings[name], beside, syncs[name]) for name in syncs if name in timings)
        return [{**row, "peak_bytes": peaks} if peaks else row for row in rows]

    def _peaks(self, runs: Mapping[str, Run], inputs: Inputs) -> dict[str, int]:
        """Bytes beyond what is allocated before; nothing on the CPU, where torch does not count them."""
        found: dict[str, int] = {}
        for name, run in runs.items() if self.timer.device.type == "cuda" else ():
            torch.cuda.reset_peak_memory_stats(self.timer.device)
            before = torch.cuda.memory_allocated(self.timer.device)
            run(*inputs)
            found[name] = torch.cuda.max_memory_allocated(self.timer.device) - before
        return found

    def _passing(
        self, measurement: Measurement, runs: Mapping[str, Run], checks: Sequence[Inputs], peer: bool = False
    ) -> dict[str, Run]:
        passing = {}
        for name, run in runs.items():
            with self._refusing(measurement, name):
                for inputs in checks:
                    verify(measurement, run, inputs, peer=peer)
                passing[name] = run
        return passing

    def _check_again(self, measurement: Measurement, originals: Sequence[Inputs], name: str, sampler: Sampler) -> None:
        """Of every input set that was timed: who is right when it is checked may be lazy when it is timed."""
        peer = name.startswith(PEER)
        if peer and not measurement.check_peers:
            return
        for inputs, run in zip(originals, sampler.again(originals), strict=True):
            verify(measurement, run, inputs, peer=peer, again=True)

    @contextmanager
    def _refusing(self, measurement: Measurement, name: str) -> Iterator[None]:
        """One kernel that fails does not keep the others from being measured."""
        try:
            yield
        except Exception as error:
            self._refuse(measurement, name, error)

    def _refuse(self, measurement: Measurement, name: str, error: Exception) -> None:
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        self.refusals.append(f"{name_of(measurement.row(name.removeprefix(PEER)))}: {kind}{error}")

    def _host_syncs(self, run: Run, input_sets: Sequence[Inputs]) -> dict[str, int]:
        """In a burst; what a kernel prepares once, it has prepared when it was checked."""
        with watch(self.timer.device) as found:
            for call in range(BURST):
                run(*input_sets[call % len(input_sets)])
        return dict(found)

    def _row(
        self, measurement: Measurement, name: str, timing: Timing, peers: Mapping[str, Timing], syncs: dict[str, int]
    ) -> Row:
        floor, floor_us = measurement.floor, self.ceilings.floor_us(measurement.floor)
        failed = {"CUDA graph capture": timing.capture_error} if timing.capture_error else {}
        return {
            **measurement.row(name),
            "us": round(timing.us, 3),
            "us_p20": round(timing.percentile(20), 3),
            "us_p80": round(timing.percentile(80), 3),
            "gb_s": round(floor.bytes / timing.us * 1e-3, 2),
            "tflop_s": round(floor.flops / timing.us * 1e-6, 4),
            "floor_us": round(floor_us, 3),
            "share_of_floor": round(floor_us / timing.us, 3),
            "faster_than_floor": timing.us < floor_us,
            "peer_us": {peer: round(other.us, 3) for peer, other in peers.items()},
            "ratio": {peer: round(other.ratio_to(timing), 3) for peer, other in peers.items()},
            "unlike_peers": [peer for peer, other in peers.items() if other.captured != timing.captured],
            "host_syncs": {**syncs, **failed},
            "captured": timing.captured,
            "tainted": timing.tainted,
            "quick": self.quick,
        }


def flags_of(row: Row) -> str:
    """What a reader must know before the numbers."""
    flags = ["FASTER THAN FLOOR"] if row["faster_than_floor"] else []
    if row["host_syncs"]:
        flags.append("host syncs: " + ", ".join(f"{name} {count}" for name, count in row["host_syncs"].items()))
    if row["tainted"]:
        flags.append("not captured, because the capture of an earlier one failed")
    flags += [f"{peer} is not timed in the same way" for peer in row["unlike_peers"]]
    return "; ".join(flags)


def line_of(row: Row) -> str:
    ratios = " ".join(f"{ratio:.2f}x {peer}" for peer, ratio in row["ratio"].items())
    return (
        f"{name_of(row):<64} {row['us']:>10.2f} us [{row['us_p20']:.2f}, {row['us_p80']:.2f}] {row['gb_s']:>8.1f} GB/s "
        f"{row['tflop_s']:>8.3f} TFLOP/s {row['share_of_floor']:>6.1%} of floor  {ratios}  {flags_of(row)}".rstrip()
    )


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has, so that one list of them serves all."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is a GPU")
    found.add_argument("--threads", type=int, help="of torch on the CPU; default: torch's own choice")
    found.add_argument("--quick", action="store_true", help="small shapes, few samples: a rehearsal")
    found.add_argument("--filter", default="", type=_pattern, metavar="REGEX", help="only rows whose name matches")
    found.add_argument("--output", type=Path, metavar="FILE", help="append the rows to this JSONL file")
    found.add_argument("--compare", type=_file, metavar="FILE", help="print this run against the rows of a JSONL file")
    return found


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"expected a regular expression, got {text!r}: {error}") from error
    return text


def _file(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"expected a file, got {text!r}")
    return Path(text)


def options_of(arguments: argparse.Namespace) -> Options:
    """Sets the threads; the rest is returned. Ends the process with status 2 if it asks for a GPU that is not there."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("expected a GPU that torch can use, found none (--device cuda)", file=sys.stderr)
        raise SystemExit(2)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Options(device, arguments.quick, arguments.filter, arguments.output, arguments.compare)


def append_rows(path: Path | None, rows: Iterable[Row]) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def main(
    description: str | None,
    kernels: Sequence[str],
    measurements: Callable[[Options], Iterable[Measurement]],
    argv: Sequence[str] | None = None,
) -> int:
    """Runs a benchmark; the exit status is 1 if a kernel was refused. kernels: all that it can measure."""
    options = options_of(parser(description).parse_args(argv))
    old = read_rows(options.compare) if options.compare else []  # before this run may append to the same file
    timer = Timer(options.device, QUICK if options.quick else FULL)
    ceilings = measure_ceilings(timer, options.quick)
    about = {**ceilings.row(), **environment(options.device)}
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    harness, rows = Harness(timer, ceilings, options.quick), []
    for measurement in measurements(options):
        wanted = {name: run for name, run in measurement.backends.items() if options.selects(measurement.row(name))}
        for row in harness.measure(replace(measurement, backends=wanted)) if wanted else ():
            rows.append({**row, **about})
            print(line_of(row), flush=True)
            append_rows(options.output, rows[-1:])
    if options.compare:
        ours = [row for row in old if row["kernel"] in kernels and options.selects(row)]
        print("\n".join(compare(ours, rows)))
    for refusal in harness.refusals:
        print(f"REFUSED {refusal}", file=sys.stderr)
    if not rows and not harness.refusals:
        print(f"no row, as rms_norm/cpp rows=8,D=2048 bfloat16, matches {options.filter!r} (--filter)", file=sys.stderr)
    return 1 if harness.refusals else 0
