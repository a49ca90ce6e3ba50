"""Two files of rows: what is faster, what is noise, what is missing, and what cannot be compared."""

from __future__ import annotations

import json

from compare import compare, name_of, read_rows

ROW = {
    "kernel": "rms_norm",
    "backend": "cpp",
    "shape": {"rows": 8, "D": 128},
    "dtype": "float32",
    "us": 10.0,
    "us_p20": 9.0,
    "us_p80": 11.0,
    "device": "A CPU",
    "driver": None,
    "threads": 2,
    "quick": False,
}


def row(us: float, **changes) -> dict:
    return {**ROW, "us": us, "us_p20": us * 0.9, "us_p80": us * 1.1, **changes}


def verdicts(old: list[dict], new: list[dict]) -> list[str]:
    """The lines below the heading, without runs of blanks."""
    return [" ".join(line.split()) for line in compare(old, new)[1:]]


def test_name():
    assert name_of(ROW) == "rms_norm/cpp rows=8,D=128 float32"


def test_only_what_lies_beyond_the_spread_is_a_difference():
    old = [row(10), row(10, backend="triton"), row(10, dtype="bfloat16")]
    new = [row(5), row(20, backend="triton"), row(11, dtype="bfloat16")]
    assert verdicts(old, new) == [
        "rms_norm/cpp rows=8,D=128 float32 10.00 5.00 2.00x faster",
        "rms_norm/triton rows=8,D=128 float32 10.00 20.00 0.50x SLOWER",
        "rms_norm/cpp rows=8,D=128 bfloat16 10.00 11.00 0.91x within spread",
    ]


def test_ranges_that_touch_are_within_spread():
    """9 ... 11 against 11 ... 13: a difference only once the ranges part."""
    touching = row(12, us_p20=11.0, us_p80=13.0)
    apart = row(12, us_p20=11.001, us_p80=13.0)
    assert "within spread" in verdicts([ROW], [touching])[0]
    assert "SLOWER" in verdicts([ROW], [apart])[0]
    assert "faster" in verdicts([apart], [ROW])[0]
    assert "within spread" in verdicts([touching], [ROW])[0]


def test_missing_and_new_rows_are_listed():
    lines = verdicts([row(10), row(7, kernel="gone")], [row(10), row(3, shape={"rows": 9, "D": 128})])
    assert lines == [
        "rms_norm/cpp rows=8,D=128 float32 10.00 10.00 1.00x within spread",
        "rms_norm/cpp rows=9,D=128 float32 - 3.00 new",
        "gone/cpp rows=8,D=128 float32 7.00 - missing",
    ]


def test_another_machine_is_refused_by_name():
    lines = verdicts([row(10, device="Another CPU")], [row(5)])
    assert lines == [
        "not compared: measured on Another CPU, this is A CPU",
        "rms_norm/cpp rows=8,D=128 float32 - 5.00 new",
    ]


def test_other_conditions_are_other_rows():
    """Threads count on a CPU, not on a GPU; a rehearsal is never a result."""
    assert [line.split()[-1] for line in verdicts([row(10, threads=1)], [row(5)])] == ["new", "missing"]
    assert [line.split()[-1] for line in verdicts([row(10, quick=True)], [row(5)])] == ["new", "missing"]
    on_gpu = {"device": "A GPU", "driver": "1.2"}
    assert verdicts([row(10, threads=1, **on_gpu)], [row(5, **on_gpu)])[0].endswith("faster")


def test_the_last_of_several_old_rows_counts():
    assert "8.00 8.00 1.00x" in verdicts([row(2), row(8)], [row(8)])[0]


def test_rows_of_other_benchmarks_are_left_out(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROW) + "\n\n" + json.dumps({"model": "tiny-vl", "foveate_s": 1.0}) + "\n")
    assert read_rows(file) == [ROW]
