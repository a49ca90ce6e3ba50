"""Bytes and operations against sums written out by hand, and the times of DESIGN's H200."""

from __future__ import annotations

import floors
import pytest
from floors import Floor

BANDWIDTH, RATE = 4.3e12, 790e12  # bytes/s and FLOP/s measured on an H200


def test_the_larger_term_is_the_floor():
    floor = Floor(reads=600, writes=400, flops=50)
    assert floor.bytes == 1000
    assert floor.seconds(bandwidth=100, rate=10) == 10  # bytes: 10 s, operations: 5 s
    assert floor.seconds(bandwidth=100, rate=2) == 25
    assert floor + Floor(1, 2, 3) == Floor(601, 402, 53)


def test_rms_norm():
    # x, bfloat16 [3, 5]: 30 bytes; weight [5]: 10 bytes; result [3, 5]: 30 bytes
    assert floors.rms_norm(3, 5, itemsize=2) == Floor(reads=30 + 10, writes=30, flops=4 * 15)


def test_rms_norm_backward():
    # read: x and the gradient, 30 bytes each, and the weight, 10; written: gradients of x, 30, and weight, 10
    assert floors.rms_norm_backward(3, 5, itemsize=2) == Floor(reads=30 + 30 + 10, writes=30 + 10, flops=11 * 15)


@pytest.mark.parametrize(("bias", "extra"), [(False, 0), (True, 5 * 4)])
def test_linear(bias, extra):
    # x float32 [2, 3]: 24 bytes; weight [5, 3]: 60; result [2, 5]: 40; 2 * 5 sums of 3 products
    assert floors.linear(2, 3, 5, itemsize=4, bias=bias) == Floor(reads=24 + 60 + extra, writes=40, flops=60)


def test_sample():
    # logits float32 [2, 10]: 80 bytes; a row's seed and step: 16; token id, log-prob, log_kept, entropy: 8 + 4 + 4 + 4
    assert floors.sample(2, 10, itemsize=4) == Floor(reads=80 + 2 * 16, writes=2 * 20, flops=7 * 20)


def test_sample_from_hidden():
    # hidden bfloat16 [2, 3]: 12 bytes; lm_head [10, 3]: 60; the rest as sample, without any logits
    assert floors.sample_from_hidden(2, 3, 10, itemsize=2) == Floor(12 + 60 + 32, 40, 2 * 2 * 3 * 10)


def test_lm_head_of_the_3b_model():
    """622 MB of weights, 0.145 ms to read; 0.202 ms of products at 256 rows, which is the floor."""
    floor = floors.sample_from_hidden(256, 2048, 151_936, itemsize=2)
    assert round(151_936 * 2048 * 2 / 1e6) == 622
    assert round(floor.reads / BANDWIDTH * 1e3, 3) == 0.145
    assert round(floor.seconds(BANDWIDTH, RATE) * 1e3, 3) == 0.202


def test_rope_store_kv():
    """3 tokens of 6 query, 2 key and 2 value heads of 4 half-precision numbers; 3 rows of cosine and sine, 3 slots."""
    moved = 3 * 10 * 4 * 2
    expected = Floor(reads=moved + 3 * 16 + 3 * 8, writes=moved, flops=3 * 3 * 8 * 4)
    assert floors.rope_store_kv(3, heads=6, kv_heads=2, head_dim=4, itemsize=2) == expected


def test_tree_attention():
    # Segments of 7 tokens for 2 rows and 3, 4 tokens for one row each; 2 KV heads of 8 dimensions, 6 query heads.
    # Keys and values float32: 2 * (7 + 3 + 4) * 2 * 8 * 4 = 1792 bytes; queries [2, 6, 8]: 384, and so the result.
    # Pairs of row and token: 7 * 2 + 3 + 4 = 21; scores and values: 2 * 2 * 8 operations for each of 6 heads.
    floor = floors.tree_attention([(7, 2), (3, 1), (4, 1)], rows=2, heads=6, kv_heads=2, head_dim=8, itemsize=4)
    assert floor == Floor(reads=1792 + 384, writes=384, flops=21 * 32 * 6)


def test_sharing_changes_bytes_and_no_operation():
    shared = floors.group_segments(groups=2, samples=3, prompt=10, own=4)
    assert shared == [(10, 3), (10, 3), *[(4, 1)] * 6]
    alone = floors.group_segments(groups=6, samples=1, prompt=10, own=4)
    sizes = dict(rows=6, heads=1, kv_heads=1, head_dim=1, itemsize=1)
    tree, copies = floors.tree_attention(shared, **sizes), floors.tree_attention(alone, **sizes)
    assert tree.flops == copies.flops
    assert copies.reads - tree.reads == 2 * (6 - 2) * 10


def test_linear_logprobs():
    # As below, without mask, advantage and old log-prob; three numbers a token are written.
    assert floors.linear_logprobs(2, 3, 10, itemsize=2) == Floor(72 + 2 * 8, 72 + 2 * 12, 3 * 120)


def test_linear_policy_loss():
    # hidden bfloat16 [2, 3]: 12 bytes, lm_head [10, 3]: 60, and their gradients; a token's target, mask, advantage and
    # old log-prob: 8 + 1 + 4 + 4; three products of 2 * 2 * 3 * 10 operations
    assert floors.linear_policy_loss(2, 3, 10, itemsize=2) == Floor(72 + 2 * 17, 72, 3 * 120)


def test_params_of_a_small_model():
    # hidden 4, q 2 * 3 = 6, kv 1 * 3 = 3, MLP 5:
    # q 4 * 6 + 6, k and v 2 * (4 * 3 + 3), out 6 * 4, MLP 3 * 4 * 5, norms 2 * 4
    model = floors.ModelShape(layers=2, hidden=4, heads=2, kv_heads=1, head_dim=3, intermediate=5, vocab=7)
    assert model.layer_params == 30 + 30 + 24 + 60 + 8
    assert model.step_params == 2 * 152 + 7 * 4
    assert model.kv_bytes_per_token == 2 * 2 * 3 * 2  # layers, keys and values, kv, bfloat16
    step = floors.decode_step(model, [(10, 2), (1, 1), (1, 1)], rows=2)
    assert step.products == Floor(332 * 2, 0, 2 * 332 * 2)
    assert step.attention == Floor(12 * 24, 0, 4 * 2 * 6 * (10 * 2 + 1 + 1))


@pytest.mark.parametrize(
    ("model", "layers", "head", "kv_bytes"),
    [
        (floors.QWEN2_5_VL_3B, 2.775, 0.311, 36_864),
        (floors.QWEN2_5_VL_7B, 6.526, 0.545, 57_344),
        (floors.QWEN2_5_0_5B, 0.358, 0.136, 12_288),
    ],
    ids=["3B", "7B", "0.5B"],
)
def test_sizes_of_published_models(model, layers, head, kv_bytes):
    """In billions of parameters; KV bytes of a token are 2 * layers * 2 * kv."""
    assert round(model.layers * model.layer_params / 1e9, 3) == layers
    assert round(model.vocab * model.hidden / 1e9, 3) == head
    assert model.kv_bytes_per_token == kv_bytes


@pytest.mark.parametrize(
    ("model", "shared_ms", "alone_ms", "overlapped_ms"),
    [
        (floors.QWEN2_5_VL_3B, 3.33, 6.49, 2.77),
        (floors.QWEN2_5_VL_7B, 6.66, 11.57, 5.36),
        (floors.QWEN2_5_0_5B, 0.76, 1.82, 0.67),
    ],
    ids=["3B", "7B", "0.5B"],
)
def test_decode_step_of_256_rows(model, shared_ms, alone_ms, overlapped_ms):
    """256 rows, prompts of 1536 tokens and 512 of their own, 16 samples a prompt, against no sharing."""

    def milliseconds(seconds: float) -> float:
        return round(seconds * 1e3, 2)

    shared = floors.decode_step(model, floors.group_segments(16, 16, 1536, 512), rows=256)
    alone = floors.decode_step(model, [(2048, 1)] * 256, rows=256)
    assert milliseconds(shared.serial_seconds(BANDWIDTH, RATE)) == shared_ms
    assert milliseconds(alone.serial_seconds(BANDWIDTH, RATE)) == alone_ms
    assert milliseconds(shared.overlapped_seconds(BANDWIDTH, RATE)) == overlapped_ms


def test_attention_scores():
    # Keys bfloat16 [7, 2, 4]: 112 bytes; 2 spans of 3 rows of 6 heads: 36 queries of 8 bytes and 4; 7 scores.
    floor = floors.attention_scores([5, 2], heads=6, kv_heads=2, head_dim=4, itemsize=2, rows=3)
    assert floor == Floor(reads=112 + 36 * 12, writes=28, flops=2 * 6 * 4 * 3 * 7)


def test_attention_scores_of_an_image_of_the_7b_model():
    """1,296 tokens, 4 key heads of 128: 1.34 MB, 9.3 MFLOP."""
    floor = floors.attention_scores([1296], heads=28, kv_heads=4, head_dim=128, itemsize=2)
    assert round(floor.bytes / 1e6, 2) == 1.34
    assert round(floor.flops / 1e6, 1) == 9.3


def test_column_scores():
    # q and k float32 [7, 2, 4]: 224 bytes each; log-sum-exp [2, 7]: 56; a score a token; 25 + 4 pairs of 2 heads
    floor = floors.column_scores([5, 2], heads=2, head_dim=4, itemsize=4)
    assert floor == Floor(reads=448 + 56, writes=28, flops=2 * 2 * 4 * 29)
    tower = floors.column_scores([5184], heads=16, head_dim=80, itemsize=2)
    assert round(tower.bytes / 1e6) == 27
    assert round(tower.flops / 1e9) == 69


def test_selections():
    # 9 scores, 3 offsets and 2 counts in; 4 indices and 3 offsets out
    assert floors.select_topk([5, 4], kept=4, itemsize=4) == Floor(reads=36 + 20, writes=28, flops=0)
    # features bfloat16 [9, 3]: 54 bytes; 10 + 6 pairs of 3 products
    assert floors.select_maxmin([5, 4], kept=4, dim=3, itemsize=2) == Floor(reads=54 + 20, writes=28, flops=2 * 16 * 3)


def test_copy_rows():
    assert floors.copy_rows(3, row_bytes=100, index_bytes=4) == Floor(reads=312, writes=300, flops=0)
