"""The kernel of csrc/sample_from_hidden: on the host, where only the product is another, and on Hopper itself."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from foveate.kernels import sampling
from foveate.kernels.sampling import masks, operators, philox, reference

HAS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
GPU = [pytest.mark.gpu, pytest.mark.skipif(not HAS_HOPPER, reason="no GPU of compute capability 9.0")]
on_hopper = pytest.mark.parametrize("backend", [pytest.param("cuda", marks=GPU)])
everywhere = pytest.mark.parametrize("backend", ["cpp", pytest.param("cuda", marks=GPU)])
SEEDS = 64  # rows that share their logits
# Sums of about 1,000 terms in another order, and another exp: relative 2^-24 each, logs below 10.
VALUES = {"rtol": 2e-6, "atol": 4e-6}


def run(backend: str, hidden, lm_head, bias=None, *, temperature, seeds, steps, allowed=None) -> sampling.SampleOutput:
    """By the operator; results on the CPU."""
    device = "cuda" if backend == "cuda" else "cpu"
    temperature = torch.as_tensor(temperature, dtype=torch.float32).expand(len(hidden)).contiguous()
    given = [hidden, lm_head, bias, temperature, seeds, steps, allowed]
    given = [x if x is None else x.to(device) for x in given]
    ids, values = operators.sample_from_hidden(*given, True, backend)
    return sampling.SampleOutput(ids.cpu(), *values.cpu().unbind())


def noise(rows: int) -> dict[str, torch.Tensor]:
    return {"seeds": torch.randint(-(2**62), 2**62, (rows,)), "steps": torch.randint(0, 2**32, (rows,))}


def hard_rows(vocab: int) -> list[torch.Tensor]:
    """Normal logits of several spreads, ties in blocks, all equal, halves at -inf, +inf, NaN, nothing above -inf,
    subnormals, one huge value, bfloat16 collisions, two maxima in different tiles, a tile of -inf, signed zeros."""
    rows = [torch.randn(vocab) * spread for spread in (0.01, 1.0, 4.0, 25.0, 1e4)]
    rows += [torch.randn(vocab).mul(4).round(), torch.zeros(vocab), torch.randn(vocab) * 1e-42]
    rows += [torch.randn(vocab).mul(4).bfloat16().float(), torch.linspace(-100, 0, vocab)]
    rows += [torch.tensor([0.0, -0.0]).repeat(vocab)[:vocab], torch.full((vocab,), -1e30)]
    planted: list[tuple[slice | list[int], float]] = [
        (slice(None, None, 2), -torch.inf), ([-1], torch.inf), ([0], torch.nan), (slice(None), -torch.inf),
        ([vocab // 2], 1e30), ([0, -1], 50.0), (slice(0, 256), -torch.inf), (slice(1, None), -torch.inf),
    ]  # fmt: skip
    for place, value in planted:
        rows.append(torch.randn(vocab))
        rows[-1][place] = value
    return rows


def near_tie(logits: torch.Tensor, temperature: float, seed: int, step: int, ids: list[int]) -> bool:
    """Whether the scores of two ids lie within 8 ulp: backends may differ by 4 ulp in the noise."""
    words = philox.noise_words(torch.tensor([seed]), torch.tensor([step]), len(logits))[0].long() & philox.MASK
    scores = (logits / temperature + reference.gumbel(words)[: len(logits)])[ids].numpy()
    return abs(float(scores[0]) - float(scores[1])) <= 8 * float(np.spacing(np.abs(scores).max()))


@everywhere
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("vocab", [4, 276, 4096, 5008])
def test_hard_rows_token_for_token(backend, vocab, is_masked):
    """The logits are the bias of a product that is 0: 20 kinds of rows, SEEDS of each, at two temperatures."""
    ties = 0
    hidden, lm_head = torch.zeros(SEEDS, 8).bfloat16(), torch.zeros(vocab, 8).bfloat16()
    for logits in hard_rows(vocab):
        for temperature in (1.0, 0.7, 0.0):
            allowed = masks.pack(torch.rand(SEEDS, vocab) < 0.3) if is_masked else None
            given = {"temperature": temperature, "allowed": allowed, **noise(SEEDS)}
            ours = run(backend, hidden, lm_head, logits, **given)
            theirs = sampling.sample(logits.expand(SEEDS, -1), backend="reference", **given)
            for row in (ours.token_ids != theirs.token_ids).nonzero().flatten().tolist():
                ids = [int(ours.token_ids[row]), int(theirs.token_ids[row])]
                place = int(given["seeds"][row]), int(given["steps"][row])
                assert temperature > 0, f"row {row}: greedy tokens {ids}"
                assert near_tie(logits, temperature, *place, ids), f"row {row}: tokens {ids}"
                ties += 1
            same = ours.token_ids == theirs.token_ids
            for got, want in zip(ours[1:], theirs[1:], strict=True):
                torch.testing.assert_close(got[same], want[same], equal_nan=True, **VALUES)
            assert torch.equal(ours.log_kept == 0, theirs.log_kept == 0)
    assert ties <= 2


@everywhere
def test_what_is_known_of_earlier_tiles_changes_nothing(backend):
    """A row's best score spares later tiles the noise of most ids; the last tiles must win as often as the first."""
    rows, vocab = 4096, 1024
    given = {"temperature": 1.0, **noise(rows)}
    drawn = run(backend, torch.zeros(rows, 8).bfloat16(), torch.zeros(vocab, 8).bfloat16(), **given)
    counts = torch.bincount(drawn.token_ids // 256, minlength=4).double()
    # Chi-square of 4 equal bins: above 28 with a probability of 4e-6.
    assert float(((counts - rows / 4) ** 2 / (rows / 4)).sum()) < 28


@everywhere
def test_what_the_kernel_does_not_take(backend):
    hidden, lm_head, given = torch.zeros(2, 8), torch.zeros(48, 8), {"temperature": 1.0, **noise(2)}
    with pytest.raises(ValueError, match=r"expected \[V, D=8\] float32.*got \[48, 8\] bfloat16.*\(lm_head\)"):
        run(backend, hidden, lm_head.bfloat16(), **given)
    with pytest.raises(ValueError, match=r"expected \[1 or 2, 2\], got \[1, 3\] \(allowed\)"):
        run(backend, hidden, lm_head, allowed=torch.zeros(1, 3, dtype=torch.int32), **given)
    with pytest.raises(ValueError, match=r"expected \[1 or 2, 2\], got \[3, 2\] \(allowed\)"):
        run(backend, hidden, lm_head, allowed=torch.zeros(3, 2, dtype=torch.int32), **given)
    if backend == "cuda":
        with pytest.raises(ValueError, match=r"expected a multiple of 4 ids, got 47 \(lm_head\)"):
            run(backend, hidden.half(), lm_head[:47].half(), **given)
        with pytest.raises(ValueError, match=r"expected float16 or bfloat16, got float32 \(hidden\)"):
            run(backend, hidden, lm_head, **given)


def exact(rows: int, dim: int, vocab: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Small dyadic numbers, whose products and sums are exact in fp32 in any order."""
    return torch.randint(-3, 4, (rows, dim)).to(dtype), (torch.randint(-2, 3, (vocab, dim)) / 8).to(dtype)


@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "dim", "vocab"), [(1, 8, 4), (63, 64, 276), (65, 72, 4096), (200, 896, 5008), (330, 2048, 49_152)]
)
def test_products_on_hopper(backend, rows, dim, vocab, dtype):
    hidden, lm_head = exact(rows, dim, vocab, dtype)
    temperature = torch.tensor([1.0, 0.0, 0.7, 2.0, 1e-4] * rows)[:rows]
    for allowed in (None, masks.pack(torch.rand(rows, vocab) < 0.5)):
        given = {"temperature": temperature, "allowed": allowed, **noise(rows)}
        ours = run(backend, hidden, lm_head, **given)
        theirs = sampling.sample(hidden.float() @ lm_head.float().T, backend="reference", **given)
        assert ours.token_ids.tolist() == theirs.token_ids.tolist()
        for got, want in zip(ours[1:], theirs[1:], strict=True):
            torch.testing.assert_close(got, want, equal_nan=True, **VALUES)


@on_hopper
def test_a_row_has_the_same_bits_in_any_batch_on_hopper(backend):
    rows, vocab = 300, 5008
    hidden, lm_head = torch.randn(rows, 1024).bfloat16(), (torch.randn(vocab, 1024) / 8).bfloat16()
    given = noise(rows)
    draw = partial(run, backend, lm_head=lm_head, temperature=0.8)
    whole = draw(hidden=hidden, **given)
    for index in (torch.randperm(rows), torch.arange(70), torch.tensor([299]), torch.arange(rows)):
        part = draw(hidden=hidden[index], seeds=given["seeds"][index], steps=given["steps"][index])
        for got, want in zip(part, whole, strict=True):
            assert torch.equal(got, want[index])


@on_hopper
def test_it_is_chosen_where_it_is_asked_for(backend):
    hidden, lm_head = (x.cuda() for x in exact(9, 64, 4096, torch.bfloat16))
    given = {"temperature": 1.0, **noise(9)}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        drawn = sampling.sample_from_hidden(hidden, lm_head, backend=backend, **given)
    assert any("draw_kernel" in event.name for event in profile.events())
    chosen = sampling.sample_from_hidden(hidden, lm_head, **given)
    assert torch.equal(drawn.token_ids, chosen.token_ids)


@on_hopper
def test_a_graph_draws_anew(backend):
    hidden, lm_head = (x.cuda() for x in exact(5, 64, 4096, torch.bfloat16))
    columns = [torch.ones(5).cuda(), *(x.cuda() for x in noise(5).values())]
    draw = partial(operators.sample_from_hidden, hidden, lm_head, None, *columns, None, True, backend)
    draw()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids, _ = draw()
    for _ in range(3):
        columns[2].add_(1)
        graph.replay()
        assert torch.equal(ids, draw()[0])


@pytest.mark.parametrize("asked", ["reference", "cpp", "layers=cuda", None])
def test_nothing_else_runs_on_it(asked, monkeypatch):
    """Where the matrices would fit, too: what is asked for by another name, or not at all, is drawn from logits."""
    hidden, lm_head = exact(3, 16, 64, torch.float32)
    given = {"temperature": 1.0, **noise(3)}
    expected = sampling.sample(hidden @ lm_head.T, backend="reference", **given)
    monkeypatch.setattr(sampling, "_fits_hopper", lambda *_: True)
    monkeypatch.setattr(operators, "sample_from_hidden", None)
    drawn = sampling.sample_from_hidden(hidden, lm_head, backend=asked, **given)
    assert torch.equal(drawn.token_ids, expected.token_ids)
    with pytest.raises(ValueError, match=r"expected 'cpp', 'cuda' or 'triton', got 'reference' \(backend\)"):
        torch.ops.foveate.sample_from_hidden(
            hidden, lm_head, None, torch.ones(3), *noise(3).values(), None, True, "reference"
        )
