"""The fewest bytes and operations a kernel can do with, computed from shapes alone.

Every input is read once and every output written once; what a kernel keeps on the chip costs nothing. A floor is
therefore a lower bound: a kernel that is measured below it moved less than was counted here, or skipped work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Segment = tuple[int, int]  # (tokens of a KV segment, query rows that attend to it)

SAMPLE_STATE = 8 + 8  # bytes a row reads beside its logits: seed and step, int64
SAMPLE_OUTPUT = 8 + 4 + 4 + 4  # token id int64; log-prob, log_kept, entropy float32
INDEX = 8  # bytes of an int64


@dataclass(frozen=True)
class Floor:
    """reads, writes: bytes. flops: floating-point operations, a multiply-add being two."""

    reads: int
    writes: int
    flops: int

    @property
    def bytes(self) -> int:
        return self.reads + self.writes

    def __add__(self, other: Floor) -> Floor:
        """Both, one after the other."""
        return Floor(self.reads + other.reads, self.writes + other.writes, self.flops + other.flops)

    def seconds(self, bandwidth: float, rate: float) -> float:
        """max(bytes / bandwidth, flops / rate); bandwidth in bytes/s, rate in FLOP/s."""
        return max(self.bytes / bandwidth, self.flops / rate)


def rms_norm(rows: int, dim: int, itemsize: int) -> Floor:
    """x / rms(x) * weight: square, add, scale and weight are 4 operations an element."""
    return Floor(reads=(rows * dim + dim) * itemsize, writes=rows * dim * itemsize, flops=4 * rows * dim)


def rms_norm_backward(rows: int, dim: int, itemsize: int) -> Floor:
    """Gradients of x and weight from x, weight and the gradient of the result.

    With r = 1 / rms(x), n = x r, h = g w: grad_weight = sum g n (3 operations an element: scale, multiply, add),
    grad_x = r (h - n mean(h n)): h (1), the mean (2), the difference and scale (3); r itself again (2).
    """
    reads = (2 * rows * dim + dim) * itemsize
    return Floor(reads=reads, writes=(rows * dim + dim) * itemsize, flops=11 * rows * dim)


def linear(rows: int, inputs: int, outputs: int, itemsize: int, *, bias: bool = False) -> Floor:
    """x [rows, inputs] @ weight [outputs, inputs]^T."""
    elements = rows * inputs + outputs * inputs + (outputs if bias else 0)
    return Floor(elements * itemsize, rows * outputs * itemsize, 2 * rows * inputs * outputs)


def sample(rows: int, vocab: int, itemsize: int) -> Floor:
    """Token, log-prob, log_kept and entropy from logits, with or without filters: one read of the logits.

    7 operations a logit: temperature, exp(z - max) (2), its sum, the entropy's multiply-add (2), adding the noise.
    The noise's own logarithms are not counted: most ids can be ruled out without them.
    """
    return Floor(rows * (vocab * itemsize + SAMPLE_STATE), rows * SAMPLE_OUTPUT, 7 * rows * vocab)


def sample_from_hidden(rows: int, dim: int, vocab: int, itemsize: int) -> Floor:
    """The LM head's product and the draw, with logits that never leave the chip: the product alone."""
    reads = (rows * dim + vocab * dim) * itemsize + rows * SAMPLE_STATE
    return Floor(reads, rows * SAMPLE_OUTPUT, 2 * rows * dim * vocab)


def rope_store_kv(tokens: int, heads: int, kv_heads: int, head_dim: int, itemsize: int) -> Floor:
    """Queries and keys rotated (3 operations an element), keys and values to their pool slots."""
    moved = tokens * (heads + 2 * kv_heads) * head_dim * itemsize
    tables = tokens * (2 * head_dim * itemsize + INDEX)  # cosine and sine, slots
    return Floor(moved + tables, moved, 3 * tokens * (heads + kv_heads) * head_dim)


def tree_attention(
    segments: Sequence[Segment], rows: int, heads: int, kv_heads: int, head_dim: int, itemsize: int
) -> Floor:
    """Decode attention of one layer over a prefix tree: every segment's keys and values are read once.

    rows: query rows of the step. Scores and weighted values are 2 operations each a (row, token, head, dimension).
    """
    keys_values = 2 * sum(tokens for tokens, _ in segments) * kv_heads * head_dim * itemsize
    queries = rows * heads * head_dim * itemsize
    return Floor(keys_values + queries, queries, 4 * heads * head_dim * sum(t * seen for t, seen in segments))


def group_segments(groups: int, samples: int, prompt: int, own: int) -> list[Segment]:
    """The tree of `groups` prompts, each with `samples` rows that have `own` tokens of their own."""
    return [(prompt, samples)] * groups + [(own, 1)] * (groups * samples)


def linear_logprobs(tokens: int, dim: int, vocab: int, itemsize: int) -> Floor:
    """Log-prob, log-sum-exp, entropy (float32) of targets (int64), and the gradients of hidden states and LM head."""
    operands = (tokens * dim + vocab * dim) * itemsize
    return Floor(operands + tokens * INDEX, operands + tokens * 3 * 4, 6 * tokens * dim * vocab)


def linear_policy_loss(tokens: int, dim: int, vocab: int, itemsize: int) -> Floor:
    """Loss and gradients from hidden states, LM head and targets: the logits' product and the two of its backward.

    Beside its target (int64) a token has a mask (bool), an advantage and an old log-prob (float32).
    """
    operands = (tokens * dim + vocab * dim) * itemsize
    return Floor(operands + tokens * (INDEX + 1 + 4 + 4), operands, 6 * tokens * dim * vocab)


def attention_scores(
    lengths: Sequence[int], heads: int, kv_heads: int, head_dim: int, itemsize: int, rows: int = 1
) -> Floor:
    """Scores of all keys of spans of these lengths by `rows` query rows each: the keys are read, no value is.

    The queries and their log-sum-exp (float32) are read once; a score is float32. 2 operations a (row, head, dimension,
    key); the exponential is not counted.
    """
    keys, queries = sum(lengths) * kv_heads * head_dim * itemsize, len(lengths) * rows * heads
    reads = keys + queries * (head_dim * itemsize + 4)
    return Floor(reads, sum(lengths) * 4, 2 * heads * head_dim * rows * sum(lengths))


def column_scores(lengths: Sequence[int], heads: int, head_dim: int, itemsize: int) -> Floor:
    """Column sums of the attention of sequences of these lengths; the exponentials are not counted."""
    tokens = sum(lengths)
    reads = 2 * tokens * heads * head_dim * itemsize + heads * tokens * 4
    return Floor(reads, tokens * 4, 2 * heads * head_dim * sum(n * n for n in lengths))


def select_topk(lengths: Sequence[int], kept: int, itemsize: int) -> Floor:
    """Scores, offsets and counts (int32) in; indices and offsets (int32) out."""
    spans = len(lengths)
    return Floor(sum(lengths) * itemsize + (2 * spans + 1) * 4, (kept + spans + 1) * 4, 0)


def select_maxmin(lengths: Sequence[int], kept: int, dim: int, itemsize: int) -> Floor:
    """Features in, indices out. The first choice needs the cosine of every pair: N (N - 1) / 2 of them, 2 D operations
    each; the matrix may stay on the chip."""
    flops = sum(n * (n - 1) * dim for n in lengths)
    spans = len(lengths)
    return Floor(sum(lengths) * dim * itemsize + (2 * spans + 1) * 4, (kept + spans + 1) * 4, flops)


def copy_rows(rows: int, row_bytes: int, index_bytes: int) -> Floor:
    """Rows read and written once, of all planes or layers together. index_bytes: what is read to find a row."""
    return Floor(rows * (row_bytes + index_bytes), rows * row_bytes, 0)


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder with gated MLP, grouped-query attention and biases on q, k and v."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    itemsize: int = 2

    @property
    def layer_params(self) -> int:
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.hidden * queries + queries + 2 * (self.hidden * keys + keys) + queries * self.hidden
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def step_params(self) -> int:
        """Weights that a decode step reads: all layers and the LM head; the embedding is a gather of a few rows."""
        return self.layers * self.layer_params + self.vocab * self.hidden

    @property
    def kv_bytes_per_token(self) -> int:
        return self.layers * 2 * self.kv_heads * self.head_dim * self.itemsize


QWEN2_5_VL_3B = ModelShape(36, 2048, 16, 2, 128, 11008, 151_936)
QWEN2_5_VL_7B = ModelShape(28, 3584, 28, 4, 128, 18944, 152_064)
QWEN2_5_0_5B = ModelShape(24, 896, 14, 2, 64, 4864, 151_936)


@dataclass(frozen=True)
class DecodeStep:
    """A whole decode step in its two parts, which run one after another or, at best, at the same time."""

    products: Floor
    attention: Floor

    def serial_seconds(self, bandwidth: float, rate: float) -> float:
        return self.products.seconds(bandwidth, rate) + self.attention.seconds(bandwidth, rate)

    def overlapped_seconds(self, bandwidth: float, rate: float) -> float:
        return (self.products + self.attention).seconds(bandwidth, rate)


def decode_step(model: ModelShape, segments: Sequence[Segment], rows: int) -> DecodeStep:
    """Weights and KV of one step. A layer's activations, a few megabytes, stay in the cache and are not counted."""
    products = Floor(model.step_params * model.itemsize, 0, 2 * model.step_params * rows)
    tokens = sum(count for count, _ in segments)
    attended = sum(count * seen for count, seen in segments)
    flops = 4 * model.layers * model.heads * model.head_dim * attended
    return DecodeStep(products, Floor(tokens * model.kv_bytes_per_token, 0, flops))
