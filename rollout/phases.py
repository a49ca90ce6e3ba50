"""Names for what the engine and the trainer do, in the traces of torch's profiler and, as NVTX ranges, of Nsight's."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch.autograd import _profiler_enabled
from torch.profiler import record_function


def phase(name: str) -> AbstractContextManager:
    """A range "foveate.<name>" while `torch.profiler.profile` or `emit_nvtx` is active in this thread.

    Without them it costs 0.3 us, where `record_function` alone takes 4.
    """
    return record_function(f"foveate.{name}") if _profiler_enabled() else nullcontext()
