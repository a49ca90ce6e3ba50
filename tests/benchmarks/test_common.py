"""The harness is honest: it refuses what is wrong, flags what is too fast, and reports what waits for the host.

Time is moved by the kernels themselves, so that no result depends on how fast the machine is.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import common
import pytest
import timing
import torch
from common import BURST, Harness, flags_of, line_of
from floors import Floor
from machine import Ceilings
from measurement import Measurement, as_exact_as
from timing import Effort, Timer

CPU = torch.device("cpu")
SIZE = 1000
UNTIMED = common.CHECKS + BURST  # calls before the first one that is timed
TIMED = 2 + 5  # two to warm up, five samples
SETS = 8  # inputs and outputs together: four times the cache of the harness
# 8,000 bytes at 10 GB/s: 0.8 us; 1,000 operations at 1 TFLOP/s are less.
FLOOR, FLOOR_US = Floor(reads=4 * SIZE, writes=4 * SIZE, flops=SIZE), 0.8
CEILINGS = Ceilings(copy_gb_s=10.0, read_gb_s=8.0, matmul_tflop_s=1.0)


class Clock:
    """Moved by the kernels; a look at it takes a picosecond, so that nothing takes no time at all."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 1e-12
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def harness(clock, monkeypatch) -> Harness:
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 4 * 4 * SIZE)
    effort = Effort(samples=5, sample_seconds=0.0, total_seconds=1e9, min_samples=1)
    return Harness(Timer(CPU, effort, clock), CEILINGS)


@pytest.fixture
def poison_empty_memory() -> None:
    """Takes the place of the suite's fixture: here the harness has to poison memory by itself."""


def doubled(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    return torch.mul(x, 2, out=out)


def taking(us: float, clock: Clock, run: Callable = doubled) -> Callable:
    def timed(*inputs):
        clock.now += us * 1e-6
        return run(*inputs)

    return timed


def make_inputs(generator: torch.Generator) -> tuple[torch.Tensor]:
    return (torch.randn(SIZE, generator=generator),)


def measurement(**changes) -> Measurement:
    defaults = Measurement(
        kernel="double",
        shape={"n": SIZE},
        dtype=torch.float32,
        make_inputs=make_inputs,
        backends={"cpp": doubled},
        check=as_exact_as(lambda x: 2 * x),
        floor=FLOOR,
    )
    return dataclasses.replace(defaults, **changes)


def test_row_of_a_right_kernel(harness, clock):
    (row,) = harness.measure(measurement(backends={"cpp": taking(1.6, clock)}, peers={"torch": taking(4.0, clock)}))
    assert not harness.refusals
    expected = {"kernel": "double", "backend": "cpp", "shape": {"n": SIZE}, "dtype": "float32"}
    expected |= {"us": 1.6, "us_p20": 1.6, "us_p80": 1.6, "gb_s": 5.0, "tflop_s": 0.0006, "floor_us": FLOOR_US}
    expected |= {"share_of_floor": 0.5, "faster_than_floor": False, "peer_us": {"torch": 4.0}, "ratio": {"torch": 2.5}}
    expected |= {"host_syncs": {}, "captured": False, "tainted": False, "unlike_peers": [], "quick": False}
    assert row == expected
    assert not flags_of(row)
    assert "2.50x torch" in line_of(row)


def test_half_the_work_is_flagged(harness, clock):
    (row,) = harness.measure(measurement(backends={"cpp": taking(FLOOR_US / 2, clock)}))
    assert row["faster_than_floor"] is True
    assert row["share_of_floor"] == 2.0
    assert "FASTER THAN FLOOR" in line_of(row)


def one_wrong_element(x):
    out = doubled(x)
    out[17] += 1e-3
    return out


def one_unwritten_element(x):
    out = torch.empty_like(x)
    out[:17], out[18:] = 2 * x[:17], 2 * x[18:]
    return out


def one_nan(x):
    out = doubled(x)
    out[-1] = torch.nan
    return out


def changes_its_input(x):
    out = doubled(x)
    x[3] = 0
    return out


def remembers():
    """Computes once and gives the same result for whatever comes."""
    kept = []
    return lambda x: kept[0] if kept else kept.append(doubled(x)) or kept[0]


def fails(x):
    raise RuntimeError("no such device function")


def after(calls, later):
    """Right as often as `calls`, then what `later` computes."""
    numbers = itertools.count()
    return lambda x: (doubled if next(numbers) < calls else later)(x)


def half_the_work(x):
    out = torch.empty_like(x)
    out[: SIZE // 2] = 2 * x[: SIZE // 2]
    return out


WRONG = {
    "one wrong element": (one_wrong_element, r"1 of 1000 elements are wrong, the first at \(17,\)"),
    "one unwritten element": (one_unwritten_element, r"at \(17,\): got nan"),
    "one NaN": (one_nan, r"at \(999,\): got nan"),
    "another shape": (lambda x: doubled(x)[:-1], r"shape torch.Size\(\[999\]\)"),
    "another dtype": (lambda x: doubled(x).half(), "float16"),
    "another number of results": (lambda x: (doubled(x), x), "2 results, expected 1"),
    "nothing": (lambda x: None, "0 results, expected 1"),
    "changed input": (changes_its_input, "input 0 was changed"),
    "remembered result": (remembers(), r"elements are wrong"),
    "failure": (fails, "RuntimeError: no such device function"),
    "lazy after the checks": (after(common.CHECKS, half_the_work), "500 of 1000 elements are wrong"),
    "lazy while it is timed": (after(UNTIMED, half_the_work), "500 of 1000 elements are wrong"),
    "lazy in the last call": (
        after(UNTIMED + TIMED + SETS - 1, half_the_work),
        "500 of 1000 elements are wrong",
    ),
    "failure after the checks": (after(common.CHECKS, fails), "RuntimeError: no such device function"),
    "failure while it is timed": (after(UNTIMED + 3, fails), "RuntimeError: no such device function"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_kernel_is_refused(harness, case):
    kernel, message = WRONG[case]
    rows = harness.measure(measurement(backends={"triton": kernel, "cpp": doubled}))
    assert [row["backend"] for row in rows] == ["cpp"]
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(*harness.refusals)
    assert harness.refusals[0].startswith("double/triton n=1000 float32: ")
    assert not harness.measure(measurement(backends={"triton": kernel}))


def test_unwritten_memory_is_poisoned(harness, monkeypatch):
    """The allocator may hand out the memory of the right result; that must not hide who never wrote it."""
    monkeypatch.setattr(torch, "empty_like", lambda x: 2 * x)
    assert harness.measure(measurement(backends={"cpp": lambda x: 2 * x}))
    assert not harness.measure(measurement(backends={"cpp": lambda x: torch.empty_like(x)}))
    assert "nan" in harness.refusals[-1]


def test_wrong_integers_are_refused(harness):
    def sorted_ids(x):
        return x.sort().indices

    def one_off(x):
        ids = sorted_ids(x)
        ids[[4, 5]] = ids[[5, 4]]
        return ids

    check = as_exact_as(sorted_ids)
    assert harness.measure(measurement(backends={"cpp": sorted_ids}, check=check))
    assert not harness.measure(measurement(backends={"cpp": one_off}, check=check))
    assert "2 of 1000 elements" in harness.refusals[0]


def test_declared_changes_of_an_input_are_results(harness):
    def double_in_place(x):
        x.mul_(2)

    declared = dict(mutates=(0,), check=as_exact_as(lambda x: 2 * x))
    assert harness.measure(measurement(backends={"cpp": double_in_place}, **declared))
    assert not harness.measure(measurement(backends={"cpp": lambda x: None}, **declared))
    assert len(harness.refusals) == 1

    def absolute(x):
        x.abs_()  # what was done before it became lazy is no result of the call that is checked

    numbers = itertools.count()
    lazy = {"cpp": lambda x: absolute(x) if next(numbers) < UNTIMED + SETS else None}
    assert not harness.measure(measurement(backends=lazy, mutates=(0,), check=as_exact_as(torch.abs)))
    assert len(harness.refusals) == 2


def test_peer_that_is_lazy_or_fails_while_it_is_timed_is_no_peer(harness):
    peers = {"lazy": after(0, half_the_work), "torch": doubled, "fails": after(1, fails)}
    (row,) = harness.measure(measurement(peers=peers))
    assert set(row["ratio"]) == {"torch"}
    peers = {"lazy": after(common.CHECKS, half_the_work), "cpp": doubled, "fails": after(common.CHECKS, fails)}
    (row,) = harness.measure(measurement(peers=peers))
    assert set(row["ratio"]) == {"cpp"}
    assert [refusal.split()[0] for refusal in harness.refusals] == [
        f"double/{name}" for name in ("lazy", "fails", "fails", "lazy")
    ]


def test_wrong_peer_is_no_peer(harness, clock):
    changes = {"backends": {"cpp": taking(2.0, clock)}, "peers": {"torch": taking(1.0, clock, one_wrong_element)}}
    (row,) = harness.measure(measurement(**changes))
    assert row["ratio"] == row["peer_us"] == {}
    assert harness.refusals[0].startswith("double/torch ")
    (row,) = harness.measure(measurement(**changes, check_peers=False))
    assert row["ratio"] == {"torch": 0.5}


def test_peers_may_be_less_exact(harness):
    """2 x is exact: a kernel may be off by 2 * (2 * 0.5 + 1) units in the last place, a peer by 8 times that."""

    def off_by(ulps):
        return lambda x: doubled(x) * (1 + ulps * 2**-23)

    (row,) = harness.measure(measurement(backends={"cpp": off_by(2), "triton": off_by(9)}, peers={"torch": off_by(9)}))
    assert row["backend"] == "cpp"
    assert set(row["ratio"]) == {"torch"}
    (row,) = harness.measure(measurement(peers={"torch": off_by(100)}))
    assert not row["ratio"]


def test_host_sync_in_a_burst_is_reported(harness):
    def peeks(x):
        return doubled(x) + 0 * x[0].item()

    with_sync, without = harness.measure(measurement(backends={"triton": peeks, "cpp": doubled}))
    assert with_sync["host_syncs"] == {"aten._local_scalar_dense.default": BURST}
    assert f"host syncs: aten._local_scalar_dense.default {BURST}" in line_of(with_sync)
    assert without["host_syncs"] == {}


def test_what_is_prepared_once_is_no_sync_of_a_burst(harness):
    prepared = []

    def prepares(x):
        if not prepared:
            prepared.append(x[0].item())
        return doubled(x)

    (row,) = harness.measure(measurement(backends={"cpp": prepares}))
    assert row["host_syncs"] == {}


def test_timed_calls_rotate_among_fresh_inputs(harness):
    seen = []

    def looks(x):
        seen.append(x.data_ptr())
        return doubled(x)

    harness.measure(measurement(backends={"cpp": looks}))
    assert len(set(seen[UNTIMED : UNTIMED + TIMED])) == TIMED
    assert len(set(seen[common.CHECKS : UNTIMED + TIMED])) == SETS
    assert len(seen) == UNTIMED + TIMED + SETS  # and each is checked again


def one(options) -> list[Measurement]:
    wrong = measurement(kernel="wrong", backends={"cpp": one_wrong_element})
    return [measurement(), wrong] if not options.quick else [measurement()]


@pytest.fixture
def run(monkeypatch, capsys):
    """A benchmark's command line -> exit status, standard output, standard error."""
    monkeypatch.setattr(common, "measure_ceilings", lambda timer, quick: CEILINGS)
    monkeypatch.setattr(common, "FULL", timing.QUICK)

    def command(*argv: str):
        status = common.main("", ("double", "wrong"), one, ["--device", "cpu", *argv])
        return status, *capsys.readouterr()

    return command


def test_refusal_is_the_exit_status(run, tmp_path):
    status, _, errors = run("--output", str(tmp_path / "new" / "rows.jsonl"))
    assert status == 1
    assert "REFUSED wrong/cpp n=1000 float32: result 0: 1 of 1000 elements are wrong" in errors
    rows = [json.loads(line) for line in (tmp_path / "new" / "rows.jsonl").read_text().splitlines()]
    assert [row["kernel"] for row in rows] == ["double"]
    for key in ("us", "device", "driver", "torch", "triton", "python", "threads", "commit", "copy_gb_s"):
        assert key in rows[0]


def test_filter_selects_by_name(run):
    status, text, _ = run("--filter", "^double/cpp n=1000")
    assert status == 0
    assert "double/cpp" in text
    status, text, errors = run("--filter", "double/triton")
    assert status == 0
    assert "double/cpp" not in text
    assert "no row" in errors
    assert "matches 'double/triton' (--filter)" in errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--filter", "["), "--filter: expected a regular expression, got '[': unterminated"),
        (("--compare", "rows.jsonl"), "--compare: expected a file, got 'rows.jsonl'"),
        (("--device", "cuda"), "expected a GPU that torch can use, found none (--device cuda)"),
    ],
)
def test_options_that_make_no_sense(words, message, run, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        run(*words)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_output_appends_and_compare_reads_what_was_there_before(run, tmp_path):
    file = tmp_path / "rows.jsonl"
    run("--quick", "--output", str(file))
    row = json.loads(file.read_text())
    stranger = {**row, "kernel": "of another benchmark"}
    gone = {**row, "kernel": "wrong"}
    file.write_text("\n".join(map(json.dumps, (row, stranger, gone))) + "\n")
    status, text, _ = run("--quick", "--output", str(file), "--compare", str(file))
    assert status == 0
    assert len(file.read_text().splitlines()) == 4
    (line,) = [line for line in text.splitlines() if line.startswith("double/cpp") and line.count("x  ")]
    assert f"{row['us']:.2f}" in line
    assert [line.split()[0] for line in text.splitlines() if line.endswith("missing")] == ["wrong/cpp"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu():
    """In a process of its own, which a failed capture spoils for the others."""
    here = Path(__file__).resolve().parent
    path = os.pathsep.join([str(Path(common.__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-P", str(here / "captures_on_gpu.py")]
    result = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=100
    )
    assert result.returncode == 0, result.stdout + result.stderr
