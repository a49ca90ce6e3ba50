"""Memory and time of one training step, from sizes alone.

Weights, gradients, optimiser states, the KV cache and what the decoder keeps for its backward are counted as torch
allocates them; the tower's activations and the workspace are estimates. What an allocator loses to fragments is not
in it: plan for RESERVE of the memory. Times are rooflines, max(bytes / bandwidth, operations / rate) of each phase:
nothing is faster, and what runs takes a multiple of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from foveate.rollout.checks import require
from foveate.rollout.prefix_groups import row_capacity
from foveate.rollout.tools.sizes import Sizes

GIB = 1 << 30
RESERVE = 0.06  # of a GPU's memory: context, libraries, fragments
# Of logits and their gradients, as `foveate.kernels.policy_loss.triton_logits` holds them at a time, where of bfloat16
# there are logits for a part of the tokens whose gradients are held.
CHUNK_BYTES, CHUNK_PARTS = 1 << 31, 4
FLOAT32 = 4


@dataclass(frozen=True)
class GPU:
    """memory: bytes that programs see. bandwidth: bytes/s. rate: FLOP/s of bfloat16 products. measured: or vendor's."""

    memory: int
    bandwidth: float
    rate: float
    measured: bool = False


GPUS: Mapping[str, GPU] = MappingProxyType(
    {
        "A100 80GB": GPU(int(79.1 * GIB), 2.039e12, 312e12),
        "H100 80GB": GPU(int(79.1 * GIB), 3.35e12, 989e12),
        "H200 141GB": GPU(int(139.8 * GIB), 4.3e12, 790e12, measured=True),
    }
)


@dataclass(frozen=True)
class Workload:
    """One step. prompts: groups of it, `n` samples each. prompt: tokens, those of images included. images, patches:
    of a prompt, and of an image. completion: tokens. itemsize: bytes of a parameter, activation or cached value.

    micro_batch: tokens of one forward with gradients, padding included. grouped: samples of a group share a run of
    their prompt. checkpointing: layers keep their inputs alone. optimizer: 2 states a parameter (AdamW). reference: a
    frozen copy of the weights. page: tokens of a KV page. sequences: samples that decode at a time. prefill: tokens of
    a prefill step.
    """

    prompts: int = 32
    n: int = 8
    prompt: int = 1024
    images: int = 1
    patches: int = 3072
    completion: int = 1024
    itemsize: int = 2
    micro_batch: int = 8192
    grouped: bool = True
    checkpointing: bool = True
    optimizer: bool = True
    reference: bool = False
    page: int = 64
    sequences: int = 512
    prefill: int = 8192

    def __post_init__(self) -> None:
        for name in ("prompts", "n", "prompt", "completion", "micro_batch", "page", "sequences", "prefill"):
            require(getattr(self, name) >= 1, "a number >= 1", getattr(self, name), name)
        for name in ("images", "patches"):
            require(getattr(self, name) >= 0, "a number >= 0", getattr(self, name), name)
        require(self.itemsize in (2, 4), "2 or 4 bytes", self.itemsize, "itemsize")

    @property
    def samples(self) -> int:
        return self.prompts * self.n


@dataclass(frozen=True)
class Rows:
    """How the trainer lays out a step. samples, tokens: of a row. per_group: rows of a group."""

    samples: int
    tokens: int
    per_group: int

    @classmethod
    def of(cls, sizes: Sizes, work: Workload) -> Rows:
        """As `foveate.rollout.prefix_groups.Packer` does, within a micro-batch; a last token is not fed."""
        own, shared = work.completion - 1, 1
        if work.grouped:
            room = min(row_capacity(work.prompt, row_cost(sizes)), max(0, work.micro_batch - work.prompt))
            shared = work.n if own == 0 else min(work.n, max(1, int(room // own)))
        return cls(shared, work.prompt + shared * own, math.ceil(work.n / shared))

    def forwarded(self, work: Workload) -> int:
        """Tokens of one pass with gradients over the step."""
        return work.samples * (work.completion - 1) + work.prompts * self.per_group * work.prompt

    def attended(self, work: Workload) -> int:
        """Pairs of tokens with a score in that pass: causal, and between siblings none."""
        prompt, own = work.prompt, work.completion - 1
        prompts = work.prompts * self.per_group * prompt * (prompt + 1) // 2
        return prompts + work.samples * (prompt * own + own * (own + 1) // 2)

    def micro_batch(self, work: Workload) -> int:
        """Tokens of the largest forward: as many rows as fit, at least one."""
        fitting = max(1, work.micro_batch // self.tokens)
        return min(fitting, work.prompts * self.per_group) * self.tokens


def row_cost(sizes: Sizes) -> float:
    """See `foveate.rollout.prefix_groups.Packer`."""
    return sizes.layers_parameters / sizes.layers / (2 * sizes.heads * sizes.head_dim)


def kv_bytes(sizes: Sizes, work: Workload) -> int:
    """Of the samples that run at a time: prompts once, each segment in pages of its own; a last token has none."""
    running = min(work.samples, work.sequences)
    groups = math.ceil(running / work.n)
    pages = groups * math.ceil(work.prompt / work.page) + running * math.ceil((work.completion - 1) / work.page)
    return pages * work.page * kv_token(sizes, work.itemsize)


def kv_token(sizes: Sizes, itemsize: int) -> int:
    """Bytes of keys and values of one token."""
    return 2 * sizes.layers * sizes.kv_heads * sizes.head_dim * itemsize


def layer_token(sizes: Sizes, itemsize: int) -> int:
    """Bytes that one decoder layer keeps of a token for its backward, under sdpa.

    Of both norms the input in float32 (a copy in half precision), its scale, the normed and the weighted value; the
    queries, repeated keys and values, the attention's result and log-sum-exp; four of the MLP's width. With norms of
    queries and keys, the input in float32, its scale and the normed value of those.
    """
    width, keys = sizes.heads * sizes.head_dim, (sizes.heads + sizes.kv_heads) * sizes.head_dim
    norms = 2 * (sizes.hidden * (FLOAT32 + 2 * itemsize) + FLOAT32)
    if sizes.qk_norm:
        norms += keys * (FLOAT32 + itemsize) + FLOAT32 * (sizes.heads + sizes.kv_heads)
    attention = 4 * width * itemsize + FLOAT32 * sizes.heads
    return norms + attention + 4 * sizes.intermediate * itemsize


def decoder_activations(sizes: Sizes, work: Workload) -> int:
    """Bytes that the decoder layers keep of a micro-batch, and its mask.

    With checkpointing the input of every layer, and one layer's own while it runs again.
    """
    own, rows = layer_token(sizes, work.itemsize), Rows.of(sizes, work)
    inputs = sizes.hidden * work.itemsize
    token = sizes.layers * inputs + own if work.checkpointing else sizes.layers * own
    mask = rows.tokens * work.itemsize if rows.samples > 1 else 0
    return rows.micro_batch(work) * (token + mask)


def tower_activations(sizes: Sizes, work: Workload) -> int:
    """Estimate of what the tower keeps: of the images of a micro-batch's prompts, as `layer_token` without norms of
    queries, keys and values of the full width."""
    tower = sizes.tower
    if tower is None or not work.images:
        return 0
    rows = Rows.of(sizes, work)
    patches = rows.micro_batch(work) // rows.tokens * work.images * work.patches
    own = tower.width * (FLOAT32 + 2 * work.itemsize) * 2 + (4 * tower.width + 4 * tower.intermediate) * work.itemsize
    inputs = tower.width * work.itemsize
    return patches * (tower.depth * inputs + own if work.checkpointing else tower.depth * own)


def loss_workspace(sizes: Sizes, work: Workload) -> int:
    """Estimate for a micro-batch: hidden states of its tokens and the gradients of these and of the LM head in float32;
    and of a chunk of tokens logits in float32 and their gradients or, later, the head's gradient in its own dtype."""
    tokens = Rows.of(sizes, work).micro_batch(work)
    parts = CHUNK_PARTS if work.itemsize < FLOAT32 else 1
    gradients = work.itemsize if work.itemsize < FLOAT32 else 0  # in the logits' place
    block = CHUNK_BYTES // (sizes.vocab * (gradients + FLOAT32 // parts))
    chunk = sizes.vocab * (min(tokens, block) * gradients + min(tokens, block // parts) * FLOAT32)
    head = sizes.vocab * sizes.hidden
    return 2 * tokens * sizes.hidden * FLOAT32 + head * FLOAT32 + max(chunk, head * work.itemsize)


def memory(sizes: Sizes, work: Workload) -> dict[str, int]:
    """Bytes by what they hold, while engine and trainer share the weights."""
    weights = sizes.parameters * work.itemsize
    parts = {"weights": weights}
    if work.reference:
        parts["reference"] = weights
    if work.optimizer:
        parts["gradients"] = weights
        parts["optimiser"] = 2 * weights + FLOAT32 * sizes.tensors  # each tensor has a step count
        parts["activations"] = decoder_activations(sizes, work) + tower_activations(sizes, work)
        parts["loss workspace"] = loss_workspace(sizes, work)
    parts["KV cache"] = kv_bytes(sizes, work)
    if sizes.tower is not None:
        tokens = work.prompts * work.images * work.patches // sizes.tower.merge
        parts["image features"] = tokens * sizes.hidden * (1 + sizes.tower.deepstack) * work.itemsize
    return parts


def times(sizes: Sizes, work: Workload, gpu: GPU) -> dict[str, float]:
    """Seconds of the phases of a step at the roofline, a multiply-add being two operations.

    prefill: every prompt once, images included. decode: each step reads the weights, all keys and values of the
    samples that run (a prompt's once for its group); the waves of `sequences` follow each other. update: forward and
    backward are three forwards, four with checkpointing; AdamW reads four values of a parameter and writes three.
    """
    width, item = sizes.heads * sizes.head_dim, work.itemsize
    layer_weights = sizes.layers_parameters * item
    head = sizes.vocab * sizes.hidden
    tower = _tower_operations(sizes, work)

    def at_least(moved: float, operations: float) -> float:
        return max(moved / gpu.bandwidth, operations / gpu.rate)

    prompts = work.prompts * work.prompt
    pairs = work.prompts * work.prompt * (work.prompt + 1) // 2
    operations = 2 * sizes.layers_parameters * prompts + 4 * width * sizes.layers * pairs + tower
    found = {"prefill": at_least(math.ceil(prompts / work.prefill) * layer_weights, operations)}
    running = min(work.samples, work.sequences)
    waves, groups, steps = work.samples / running, running / work.n, work.completion
    read = steps * groups * work.prompt + running * steps * (steps + 1) / 2  # tokens of the cache, over all steps
    seen = running * (steps * work.prompt + steps * (steps + 1) / 2)
    moved = steps * (layer_weights + head * item) + read * kv_token(sizes, item)
    products = 2 * (sizes.layers_parameters + head) * running * steps + 4 * width * sizes.layers * seen
    found["decode"] = waves * at_least(moved, products)
    if work.optimizer:
        passes = 4 if work.checkpointing else 3
        rows = Rows.of(sizes, work)
        forward = 2 * sizes.layers_parameters * rows.forwarded(work) + 4 * width * sizes.layers * rows.attended(work)
        loss = 4 * 2 * head * work.samples * work.completion  # its logits are computed twice whatever is kept
        found["update"] = at_least(0, passes * (forward + rows.per_group * tower) + loss)
        found["optimiser"] = at_least(7 * sizes.parameters * item, 0)
    return found


def _tower_operations(sizes: Sizes, work: Workload) -> float:
    """Of one pass of all images; full attention within each image, more than windowed towers have."""
    tower = sizes.tower
    if tower is None:
        return 0.0
    patches = work.prompts * work.images * work.patches
    return 2.0 * tower.parameters * patches + 4.0 * tower.width * tower.depth * patches * work.patches
