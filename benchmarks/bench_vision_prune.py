"""The primitives of vision-token pruning: run as `python benchmarks/bench_vision_prune.py`.

Peers are what the methods' authors run. `matrix` writes the attention matrix: all queries for FastV's score of the last
one, all heads of a tower's block for the column's sum. `row` is the last query's softmax alone, in plain torch. `topk`
and `loop` go through the batch one image at a time; the latter is DivPrune's python loop, which reads the rows of all
chosen tokens at every step. `index` is one indexing operation a plane, or a layer.

Sizes are Qwen2.5-VL-7B's: 28 query and 4 key heads of 128, hidden states of 3584, 28 layers; images of 1,296 tokens, of
which 144 are kept; the tower has 16 heads of 80 and 4 patches a token. On a CPU images are smaller.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import floors
import torch
from common import Options, backends_of, main
from measurement import Measurement, Results, as_exact_as
from samplers import Inputs, Run

from foveate.kernels import vision_prune
from foveate.kernels.vision_prune.arguments import backend_for

KERNELS = ("attention_scores", "column_scores", "select_topk", "select_maxmin", "compact", "compact_kv")
PAGE = 16


def spans(count: int, tokens: int, kept: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """offsets int32 [count + 1] and counts int32 [count]"""
    offsets = torch.arange(count + 1, dtype=torch.int32, device=device) * tokens
    return offsets, torch.full((count,), kept, dtype=torch.int32, device=device)


def sequence_inputs(
    count: int, tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, generator: torch.Generator
) -> Inputs:
    """queries and keys of all tokens, log-sum-exp of the last query of each sequence, offsets"""
    draw = partial(torch.randn, device=generator.device, generator=generator)
    q, k = draw(count * tokens, heads, dim).to(dtype), draw(count * tokens, kv_heads, dim).to(dtype)
    offsets, _ = spans(count, tokens, 0, generator.device)
    return q, k, vision_prune.logsumexp(q[tokens - 1 :: tokens], k, offsets, scale=dim**-0.5), offsets


def score_keys(backend: str, q, k, lse, offsets) -> torch.Tensor:
    last = q[len(q) // len(lse) - 1 :: len(q) // len(lse)]
    return vision_prune.attention_scores(last, k, lse, offsets, scale=q.shape[-1] ** -0.5, backend=backend)


def last_row(q, k, lse, offsets) -> torch.Tensor:
    """Of each sequence the last query's softmax, averaged over heads; its log-sum-exp is computed again."""
    count, kv_heads, dim = len(lse), k.shape[1], k.shape[2]
    keys = k.view(count, -1, kv_heads, dim).transpose(1, 2)
    last = q.view(count, -1, kv_heads, q.shape[1] // kv_heads, dim)[:, -1]
    return ((last @ keys.transpose(2, 3)) * dim**-0.5).softmax(-1, dtype=_wide(q)).mean((1, 2)).flatten()


def attention_matrix(q, k, lse, offsets) -> torch.Tensor:
    """Causal attention of all queries; then the last row, averaged over heads."""
    count, dim = len(lse), k.shape[2]
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).view(count, -1, q.shape[1], dim).transpose(1, 2)
    logits = q.view(count, -1, q.shape[1], dim).transpose(1, 2) @ keys.transpose(2, 3) * dim**-0.5
    hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return logits.masked_fill(hidden, -torch.inf).softmax(-1, dtype=_wide(q))[:, :, -1].mean(1).flatten()


def tower_inputs(patches: int, heads: int, dim: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """q and k of two equal images, log-sum-exp, cu_seqlens"""
    draw = partial(torch.randn, device=generator.device, generator=generator)
    q, k = draw(2 * patches, heads, dim).to(dtype), draw(2 * patches, heads, dim).to(dtype)
    ends, _ = spans(2, patches, 0, generator.device)
    lse = vision_prune.logsumexp(q, k, ends, scale=dim**-0.5, row_offsets=ends)
    return q, k, lse.t().contiguous(), ends


def score_columns(backend: str, q, k, lse, cu_seqlens) -> torch.Tensor:
    return vision_prune.column_scores(q, k, lse, cu_seqlens, scale=q.shape[-1] ** -0.5, backend=backend)


def tower_matrix(q, k, lse, cu_seqlens) -> torch.Tensor:
    images = zip(q.chunk(2), k.chunk(2), strict=True)
    products = (left.transpose(0, 1) @ right.permute(1, 2, 0) * q.shape[-1] ** -0.5 for left, right in images)
    return torch.cat([logits.softmax(-1, dtype=_wide(q)).sum((0, 1)) for logits in products])


def score_inputs(count: int, tokens: int, kept: int, generator: torch.Generator) -> Inputs:
    """scores with ties, offsets, counts"""
    scores = torch.rand(count * tokens, device=generator.device, generator=generator)
    return scores.bfloat16().float(), *spans(count, tokens, kept, generator.device)


def select_best(backend: str, kept: int, scores, offsets, counts) -> tuple[torch.Tensor, ...]:
    return vision_prune.select_topk(scores, offsets, counts, num_kept=kept, backend=backend)


def sort_each(kept: int, scores, offsets, counts) -> tuple[torch.Tensor, ...]:
    """Ties as they come: torch.topk promises nothing."""
    rows = scores.view(len(counts), -1)
    found = [row.topk(kept // len(counts)).indices.sort().values for row in rows]
    return torch.cat(found).int(), torch.arange(len(counts) + 1, dtype=torch.int32, device=scores.device)


def check_best(kept: int, inputs: Inputs, results: Results, room: float) -> None:
    scores, counts = inputs[0], inputs[2]
    order = scores.view(len(counts), -1).sort(dim=-1, descending=True, stable=True).indices
    wanted = order[:, : kept // len(counts)].sort(-1).values.flatten().int()
    assert torch.equal(results[0], wanted), "not the best tokens, ties to the lowest index"


def feature_inputs(
    count: int, tokens: int, kept: int, dim: int, dtype: torch.dtype, generator: torch.Generator
) -> Inputs:
    """features, offsets and counts on the CPU, from where sizes are read without waiting"""
    features = torch.randn(count * tokens, dim, device=generator.device, generator=generator).to(dtype)
    return features, *spans(count, tokens, kept, torch.device("cpu"))


def select_far(backend: str, features, offsets, counts) -> tuple[torch.Tensor, ...]:
    return vision_prune.select_maxmin(features, offsets, counts, backend=backend)


def greedy_loop(features, offsets, counts) -> torch.Tensor:
    """The authors' search, an image at a time."""
    found = []
    for (start, stop), count in zip(pairwise(offsets.tolist()), counts.tolist(), strict=True):
        units = features[start:stop] / features[start:stop].norm(dim=1, keepdim=True)
        distances = 1 - units @ units.T
        chosen = distances.topk(2, dim=0, largest=False).values[1].argmax()[None]
        while len(chosen) < count:
            chosen = torch.cat([chosen, distances[chosen].amin(0).argmax()[None]])
        found.append(chosen.sort().values)
    return torch.cat(found)


def check_far(inputs: Inputs, results: Results, room: float) -> None:
    """In float64, of what was kept the farthest is always as far as any token, but for 1e-5 of near ties."""
    features, offsets, _ = inputs
    indices, kept_offsets = (x.tolist() for x in results)
    for (start, stop), (first, last) in zip(pairwise(offsets.tolist()), pairwise(kept_offsets), strict=True):
        units = torch.nn.functional.normalize(features[start:stop].double(), dim=1)
        cosines = units @ units.T
        left = indices[first:last]
        closest = (cosines - 3 * torch.eye(len(units), device=units.device)).amax(0)
        for step in range(last - first):
            token = min(left, key=closest.tolist().__getitem__)
            assert closest[token] <= closest.min() + 1e-5, f"choice {step} of the image at {start} is too close"
            left = [other for other in left if other != token]
            closest = torch.maximum(closest, cosines[token]) if step else cosines[token].clone()
            closest[[t for t in indices[first:last] if t not in left]] = torch.inf


def plane_inputs(tokens: int, kept: int, dim: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """rows, hidden states, residual, positions, three deepstack planes, slots"""
    draw = partial(torch.randn, device=generator.device, generator=generator)
    rows = torch.randperm(tokens, generator=generator, device=generator.device)[:kept].sort().values.int()
    states, deepstack = draw(2, tokens, dim).to(dtype), draw(3, tokens, dim).to(dtype)
    positions = torch.arange(3 * tokens, dtype=torch.int32, device=generator.device).view(3, tokens)
    return rows, *states, positions, deepstack, torch.arange(tokens, device=generator.device)


def compact(backend: str, rows, *planes) -> list[torch.Tensor]:
    return vision_prune.compact(planes, rows, dims=[0, 0, 1, 1, 0], backend=backend)


def index_planes(rows, hidden, residual, positions, deepstack, slots) -> list[torch.Tensor]:
    places = rows.long()
    return [hidden[places], residual[places], positions[:, places], deepstack[:, places], slots[places]]


def pool_inputs(layers: int, tokens: int, kept: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """pool, slots of the kept tokens, and of where they go"""
    pages = -(-tokens // PAGE) + -(-kept // PAGE)
    pool = torch.randn(2, layers, pages, PAGE, 4, 128, device=generator.device, generator=generator).to(dtype)
    source = torch.randperm(tokens, generator=generator, device=generator.device)[:kept].sort().values
    return pool, source, torch.arange(kept, device=generator.device) + (pages - -(-kept // PAGE)) * PAGE


def compact_kv(backend: str, pool, source, target) -> None:
    vision_prune.compact_kv(pool, pool, source, target, backend=backend)


def index_layers(pool, source, target) -> None:
    for layer in pool.flatten(0, 1):
        rows = layer.view(-1, *layer.shape[2:])
        rows[target] = rows[source]


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def ours(primitive: str, run: Run, device: torch.device) -> dict[str, Run]:
    """By name, the backends that serve the primitive there."""
    names = [name for name in backends_of("vision_prune", device) if serves(primitive, name, device)]
    return {name: partial(run, name) for name in names}


def serves(primitive: str, backend: str, device: torch.device) -> bool:
    try:
        return backend_for(primitive, backend, device) == backend
    except ValueError:
        return False


def score_measurements(options: Options, on_gpu: bool) -> Iterator[Measurement]:
    dtype = torch.bfloat16 if on_gpu else torch.float32
    shapes = [(1, 1296), (8, 1296), (64, 1296)] if on_gpu else [(1, 320), (8, 320)]
    for count, tokens in [(2, 40)] if options.quick else shapes:
        peers = {"row": last_row} | ({"matrix": attention_matrix} if count < 64 else {})
        yield Measurement(
            kernel="attention_scores", shape={"spans": count, "N": tokens}, dtype=dtype,
            make_inputs=partial(sequence_inputs, count, tokens, 28, 4, 128, dtype),
            backends=ours("attention_scores", score_keys, options.device), check=as_exact_as(last_row),
            floor=floors.attention_scores([tokens] * count, 28, 4, 128, dtype.itemsize), peers=peers,
        )  # fmt: skip
    heads, dim = (2, 16) if options.quick else (16, 80)
    for patches in [24] if options.quick else [1024, 5184] if on_gpu else [640]:
        yield Measurement(
            kernel="column_scores", shape={"images": 2, "P": patches}, dtype=dtype,
            make_inputs=partial(tower_inputs, patches, heads, dim, dtype),
            backends=ours("column_scores", score_columns, options.device), check=as_exact_as(tower_matrix),
            floor=floors.column_scores([patches] * 2, heads, dim, dtype.itemsize), peers={"matrix": tower_matrix},
        )  # fmt: skip


def selection_measurements(options: Options, on_gpu: bool) -> Iterator[Measurement]:
    shapes = [(1, 1296, 144), (8, 1296, 144), (64, 1296, 648), (1, 16_384, 4096)]
    for count, tokens, kept in [(2, 40, 9)] if options.quick else shapes:
        total = count * kept
        yield Measurement(
            kernel="select_topk", shape={"spans": count, "N": tokens, "k": kept}, dtype=torch.float32,
            make_inputs=partial(score_inputs, count, tokens, kept),
            backends=ours("select_topk", lambda name, *x, k=total: select_best(name, k, *x), options.device),
            check=partial(check_best, total), floor=floors.select_topk([tokens] * count, total, 4),
            peers={"topk": partial(sort_each, total)}, check_peers=False,
        )  # fmt: skip
    dtype = torch.bfloat16 if on_gpu else torch.float32
    shapes = [(1, 1296, 144), (8, 1296, 144)] if on_gpu else [(1, 256, 64), (4, 256, 64)]
    for count, tokens, kept in [(2, 20, 5)] if options.quick else shapes:
        dim = 32 if options.quick else 3584
        yield Measurement(
            kernel="select_maxmin", shape={"spans": count, "N": tokens, "k": kept, "D": dim}, dtype=dtype,
            make_inputs=partial(feature_inputs, count, tokens, kept, dim, dtype),
            backends=ours("select_maxmin", select_far, options.device), check=check_far,
            floor=floors.select_maxmin([tokens] * count, count * kept, dim, dtype.itemsize),
            peers={"loop": greedy_loop}, check_peers=False,
        )  # fmt: skip


def moving_measurements(options: Options, on_gpu: bool) -> Iterator[Measurement]:
    dtype = torch.bfloat16
    dim, layers = (64, 3) if options.quick else (3584, 26)
    for tokens, kept in [(40, 9)] if options.quick else [(1360, 712), (10_880, 5696)] if on_gpu else [(1360, 712)]:
        row_bytes = 5 * dim * dtype.itemsize + 3 * 4 + 8
        yield Measurement(
            kernel="compact", shape={"T": tokens, "kept": kept, "D": dim}, dtype=dtype,
            make_inputs=partial(plane_inputs, tokens, kept, dim, dtype),
            backends=ours("compact", compact, options.device), check=as_exact_as(index_planes),
            floor=floors.copy_rows(kept, row_bytes, 4), peers={"index": index_planes},
        )  # fmt: skip
        yield Measurement(
            kernel="compact_kv", shape={"T": tokens, "kept": kept, "layers": layers}, dtype=dtype,
            make_inputs=partial(pool_inputs, layers, tokens, kept, dtype),
            backends=ours("compact_kv", compact_kv, options.device), check=check_pool,
            floor=floors.copy_rows(kept, 2 * layers * 4 * 128 * dtype.itemsize, 16),
            peers={"index": index_layers}, mutates=(0,),
        )  # fmt: skip


def check_pool(inputs: Inputs, results: Results, room: float) -> None:
    wanted = inputs[0].clone()
    index_layers(wanted, *inputs[1:])
    assert torch.equal(results[-1], wanted), "other keys and values than were to be moved"


def measurements(options: Options) -> Iterator[Measurement]:
    on_gpu = options.device.type == "cuda"
    yield from score_measurements(options, on_gpu)
    yield from selection_measurements(options, on_gpu)
    yield from moving_measurements(options, on_gpu)


if __name__ == "__main__":
    raise SystemExit(main(__doc__, KERNELS, measurements))
