"""The pruning primitives on a GPU: the integers of the CPU, scores near float64, and no waiting."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from foveate.kernels import vision_prune
from foveate.kernels.dispatch import available

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
SIZES = (1296, 0, 17, 1, 4097, 64, 63, 65)


@pytest.fixture(scope="module", autouse=True)
def compiled():
    assert {"cuda", "triton"} <= set(available("vision_prune", torch.device("cuda")))


def offsets_of(sizes) -> torch.Tensor:
    return torch.tensor([0, *np.cumsum(sizes)], dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_selections_are_those_of_the_cpu(dtype):
    offsets, counts = offsets_of(SIZES), torch.tensor([size // 3 for size in SIZES], dtype=torch.int32)
    scores = torch.randn(int(offsets[-1])).bfloat16().float().to(dtype)
    scores[::7] = torch.nan
    forced = torch.rand(len(scores)) < 0.1
    features = (1 + 0.01 * torch.randn(len(scores), 200)).to(dtype)
    num_kept = int(counts.sum())
    for on_cpu, on_gpu in (
        (
            vision_prune.select_topk(scores, offsets, counts, forced=forced),
            vision_prune.select_topk(
                scores.cuda(), offsets.cuda(), counts.cuda(), forced=forced.cuda(), num_kept=num_kept
            ),
        ),
        (
            vision_prune.select_maxmin(features, offsets, counts),
            vision_prune.select_maxmin(features.cuda(), offsets, counts),
        ),
    ):
        assert on_gpu.indices.is_cuda
        assert torch.equal(on_gpu.indices.cpu(), on_cpu.indices)
        assert torch.equal(on_gpu.offsets.cpu(), on_cpu.offsets)


def test_maxmin_holds_no_matrix_of_long_spans(monkeypatch):
    """The same tokens, whether their cosines are held or not."""
    offsets, counts = offsets_of(SIZES), torch.tensor([size // 3 for size in SIZES], dtype=torch.int32)
    features = (1 + 0.01 * torch.randn(int(offsets[-1]), 200)).cuda()
    held = vision_prune.select_maxmin(features, offsets, counts)
    for limit in (1296, 0):
        monkeypatch.setattr(vision_prune, "HELD_TOKENS", limit)
        kept = vision_prune.select_maxmin(features, offsets, counts)
        assert torch.equal(kept.indices, held.indices)
        assert torch.equal(kept.offsets, held.offsets)


def test_rows_are_copied():
    planes = [torch.randn(999, 136).bfloat16(), torch.randint(2**30, (3, 999), dtype=torch.int32), torch.arange(999)]
    rows = torch.arange(0, 999, 3, dtype=torch.int32)
    moved = vision_prune.compact([plane.cuda() for plane in planes], rows.cuda(), dims=[0, 1, 0])
    for plane, dim, out in zip(planes, (0, 1, 0), moved, strict=True):
        assert torch.equal(out.cpu(), plane.index_select(dim, rows))
    pool = torch.randn(2, 3, 9, 16, 2, 64).bfloat16()
    on_gpu, source, target = pool.cuda(), torch.arange(0, 60, 2), torch.arange(100, 130)
    vision_prune.compact_kv(pool[:, 1:], pool[:, 1:], source, target)
    vision_prune.compact_kv(on_gpu[:, 1:], on_gpu[:, 1:], source.cuda(), target.cuda())
    assert torch.equal(on_gpu.cpu(), pool)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(28, 4, 128), (16, 16, 80), (4, 2, 72)])
def test_scores_are_near_those_in_float64(dtype, heads, kv_heads, dim):
    offsets, scale = offsets_of(SIZES).cuda(), dim**-0.5
    total = int(offsets[-1])
    queries = torch.randn(len(SIZES), heads, dim, device="cuda", dtype=dtype)
    keys = torch.randn(total, kv_heads, dim, device="cuda", dtype=dtype)
    lse = vision_prune.logsumexp(queries, keys, offsets, scale=scale)
    scores = vision_prune.attention_scores(queries, keys, lse, offsets, scale=scale)
    columns = vision_prune.column_scores(keys, keys, None, offsets, scale=scale)
    ends = offsets.tolist()
    # Sums of dim products in float32, each off by 2^-24 of its value, move a logit by less than 1e-5, and 5,000 terms
    # add up to 1e-4 at worst.
    for s, (start, stop) in enumerate(pairwise(ends)):
        k = keys[start:stop].double()
        logits = torch.einsum("hd,nhd->hn", queries[s].double(), k.repeat_interleave(heads // kv_heads, 1)) * scale
        assert torch.allclose(lse[s].double(), logits.logsumexp(-1), rtol=1e-5, atol=1e-5)
        wanted = (logits - lse[s].double()[:, None]).exp().mean(0)
        assert torch.allclose(scores[start:stop].double(), wanted, rtol=1e-4, atol=0)
        wanted = (torch.einsum("phd,nhd->hpn", k, k) * scale).softmax(-1).sum((0, 1))
        assert torch.allclose(columns[start:stop].double(), wanted, rtol=1e-4, atol=0)


def test_nothing_waits_where_sizes_are_given():
    offsets, counts = offsets_of(SIZES), torch.tensor([size // 3 for size in SIZES], dtype=torch.int32)
    scores = torch.randn(int(offsets[-1]), device="cuda")
    keys = torch.randn(len(scores), 2, 64, device="cuda", dtype=torch.bfloat16)
    on_gpu, counts_on_gpu, num_kept = offsets.cuda(), counts.cuda(), int(counts.sum())
    for mode in ("default", "error"):  # the first time compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            selection = vision_prune.select_topk(scores, on_gpu, counts_on_gpu, num_kept=num_kept)
            rows = vision_prune.selected_rows(selection, on_gpu[:-1])
            vision_prune.compact([scores, keys], rows)
            vision_prune.column_scores(keys, keys, None, on_gpu, scale=0.1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(rows) == num_kept
