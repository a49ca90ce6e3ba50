"""Rows of an earlier run against rows of this one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# What must agree for two rows to be of the same measurement, beside the machine.
IDENTITY = ("kernel", "backend", "shape", "dtype", "threads", "quick")


def read_rows(path: Path) -> list[Row]:
    """The kernels' rows of a JSONL file; those of other benchmarks are left out."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [row for row in rows if "us_p20" in row]


def shape_text(shape: dict[str, Any]) -> str:
    return ",".join(f"{name}={size}" for name, size in shape.items())


def name_of(row: Row) -> str:
    """The name that --filter is matched against."""
    return f"{row['kernel']}/{row['backend']} {shape_text(row['shape'])} {row['dtype']}"


def identity(row: Row) -> str:
    # Threads of the host do not change what a GPU does.
    ignored = "threads" if row.get("driver") else ""
    return json.dumps([row.get(key) for key in IDENTITY if key != ignored], sort_keys=True)


def verdict(old: Row, new: Row) -> str:
    """Faster or slower only where the ranges from p20 to p80 do not meet."""
    if new["us_p80"] < old["us_p20"]:
        return "faster"
    return "SLOWER" if new["us_p20"] > old["us_p80"] else "within spread"


def compare(old: Sequence[Row], new: Sequence[Row]) -> list[str]:
    """Lines of a table, new against old; of several old rows of one measurement the last one counts."""
    devices = {row["device"] for row in new}
    strangers = sorted({row["device"] for row in old} - devices) if new else []
    lines = [f"not compared: measured on {device}, this is {', '.join(sorted(devices))}" for device in strangers]
    before = {(identity(row), row["device"]): row for row in old if row["device"] not in strangers}
    after = {(identity(row), row["device"]): row for row in new}
    for key, row in after.items():
        if key not in before:
            lines.append(f"{name_of(row):<64} {'-':>10} {row['us']:>10.2f} {'':>8}  new")
            continue
        base = before[key]
        speedup = base["us"] / row["us"]
        lines.append(
            f"{name_of(row):<64} {base['us']:>10.2f} {row['us']:>10.2f} {speedup:>7.2f}x  {verdict(base, row)}"
        )
    missing = [row for key, row in before.items() if key not in after]
    lines += [f"{name_of(row):<64} {row['us']:>10.2f} {'-':>10} {'':>8}  missing" for row in missing]
    return [f"{'kernel':<64} {'old us':>10} {'new us':>10} {'speed-up':>8}", *lines]
