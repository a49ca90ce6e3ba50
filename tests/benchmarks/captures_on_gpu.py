"""What the harness does where graphs can be captured, and after one could not be; run by test_common.py on a GPU."""

from __future__ import annotations

import torch
from common import BURST, Harness
from floors import Floor
from machine import Ceilings
from measurement import Measurement, as_exact_as
from samplers import Run
from timing import QUICK, Timer

DEVICE = torch.device("cuda")
SIZE = 1000


def doubled(x: torch.Tensor) -> torch.Tensor:
    return torch.mul(x, 2, out=torch.empty_like(x))


def peeks(x: torch.Tensor) -> torch.Tensor:
    return doubled(x) + 0 * x[0].item()


def waits_unseen(x: torch.Tensor) -> torch.Tensor:
    torch.cuda.current_stream().query()  # not allowed while a graph is captured
    return doubled(x)


def lazy_in_a_graph(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    if not torch.cuda.is_current_stream_capturing():
        return torch.mul(x, 2, out=out)
    torch.mul(x[: SIZE // 2], 2, out=out[: SIZE // 2])
    return out


def measurement(backends: dict[str, Run]) -> Measurement:
    return Measurement(
        kernel="double",
        shape={"n": SIZE},
        dtype=torch.float32,
        make_inputs=lambda generator: (torch.randn(SIZE, generator=generator, device=DEVICE),),
        backends=backends,
        check=as_exact_as(lambda x: 2 * x),
        floor=Floor(4 * SIZE, 4 * SIZE, SIZE),
    )


def expect(rows: list[dict], **columns: list) -> None:
    for column, expected in columns.items():
        got = [row[column] for row in rows]
        assert got == expected, f"{column}: {got}"


def main() -> None:
    harness = Harness(Timer(DEVICE, QUICK), Ceilings(copy_gb_s=10.0, read_gb_s=8.0, matmul_tflop_s=1.0))
    rows = harness.measure(measurement({"triton": lazy_in_a_graph, "cuda": doubled}))
    expect(rows, backend=["cuda"], captured=[True], tainted=[False])
    (refusal,) = harness.refusals
    assert refusal.startswith("double/triton"), refusal
    assert "elements are wrong" in refusal, refusal

    stream = torch.cuda.current_stream()
    backends = {"cuda": doubled, "triton": peeks, "cpp": waits_unseen, "reference": doubled}
    rows = harness.measure(measurement(backends))  # the first is replayed after the capture of the third has failed
    expect(rows, backend=list(backends), captured=[True, False, False, False], tainted=[False, False, False, True])
    failed = rows[2]["host_syncs"].pop("CUDA graph capture")
    assert "invalidated" not in failed, failed  # that is what follows from the error in the kernel
    expect(rows, host_syncs=[{}, {"aten._local_scalar_dense.default": BURST}, {}, {}])
    assert torch.cuda.current_stream() == stream
    expect(harness.measure(measurement({"cuda": doubled})), captured=[False], tainted=[True])
    assert len(harness.refusals) == 1, harness.refusals


if __name__ == "__main__":
    main()
