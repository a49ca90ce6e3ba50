"""The benchmarks are scripts that import each other; here their folder is put where Python would look for it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
