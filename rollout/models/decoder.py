"""One decoder for all families: pre-norm transformer layers over paged KV segments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from transformers.activations import ACT2FN

from foveate.kernels import paged_attention
from foveate.kernels.dispatch import choose, for_family
from foveate.kernels.layers import elementwise, linear, rms_norm, rope_store_kv, rotate
from foveate.kernels.paged_attention import StepPlan
from foveate.rollout.models.spec import Deepstack, ModelSpec
from foveate.rollout.models.weights import LayerWeights, Weights

Pair = tuple[torch.Tensor, torch.Tensor]
ROW_BLOCK = 64  # of every matrix product in deterministic mode


class Decoder:
    """Runs T new tokens through all layers, storing their keys and values in the pool.

    deterministic: on the CPU and with one number of threads, a token's bits depend on its path alone: not on the other
    tokens of the step, nor on how many there are, nor on the steps in which the path was computed. Matrix products
    then run in blocks of 64 rows, attention by the chunk rule, transcendental functions on tensors without tails; what
    is left rounds each element, or (`rms_norm`) each row by itself.
    """

    def __init__(self, spec: ModelSpec, weights: Weights, backend: str | None = None, deterministic: bool = False):
        self.spec = spec
        self.weights = weights
        self.backend = backend
        # What a decode step calls in every layer is chosen once: of a small model's step it took 0.5 ms of 20.
        self.layers_backend = choose("layers", backend, weights.device, weights.dtype)
        self.rope_backend = self.layers_backend if self.layers_backend != "triton" else None
        self.attention_backend = for_family("paged_attention", backend)
        self.decode_backend = paged_attention.decode_backend(
            weights.device, weights.dtype, spec.head_dim, deterministic=deterministic, backend=self.attention_backend
        )
        self.deterministic = deterministic
        self.linear = partial(linear, row_block=ROW_BLOCK if deterministic else None)
        self.activation = ACT2FN[spec.activation]
        self.scale = spec.head_dim**-0.5
        planes = spec.rope_planes
        self.rope_planes = None if planes is None else torch.tensor(planes, device=weights.device)

    def __call__(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        kv_pool: torch.Tensor,
        plans: Sequence[StepPlan],
        decode: bool,
        deepstack: Deepstack | None = None,
    ) -> torch.Tensor:
        """hidden: float [T, hidden]. positions: int64 [3, T].

        kv_pool: float [2, layers a page, pages, page_size, kv_heads, head_dim], written at the plans' slots. plans: one
        for each block of layers that a page holds. Returns float [T, hidden], after the final norm.
        """
        rotary = self.rotary(positions, hidden.dtype)
        layers = range(self.spec.num_layers)
        hidden, _ = self.run(layers, hidden, rotary, kv_pool, plans, decode=decode, deepstack=deepstack)
        return self.norm(hidden, self.weights.norm, self.weights.eps)

    def run(
        self,
        layers: range,
        hidden: torch.Tensor,
        rotary: Pair,
        kv_pool: torch.Tensor,
        plans: Sequence[StepPlan],
        *,
        decode: bool = False,
        deepstack: Deepstack | None = None,
        projected: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A run of layers. projected: q, k, v of the first one, where they exist.

        plans: of the blocks from that of the first layer on. Returns the residual stream, float [T, hidden], and q of
        the last layer, float [T, heads, head_dim].
        """
        attention = partial(
            paged_attention.decode if decode else paged_attention.prefill,
            scale=self.scale,
            deterministic=self.deterministic,
            backend=self.decode_backend if decode else self.attention_backend,
        )
        size = kv_pool.shape[1]
        for index in layers:
            layer, plan = self.weights.layers[index], plans[(index - layers.start) // size]
            pools = kv_pool[0, index % size], kv_pool[1, index % size]
            if projected is None:
                q = self.project_and_store(self.norm(hidden, layer.input_norm, layer.eps), layer, rotary, pools, plan)
            else:
                q, k, v = projected
                projected = None
                paged_attention.store_kv(k, v, *pools, plan, backend=self.attention_backend)
            mixed = attention(q, *pools, plan)
            hidden = hidden + self.linear(mixed.flatten(1), *layer.o)
            hidden = hidden + self.mlp(self.norm(hidden, layer.post_norm, layer.eps), layer)
            if deepstack is not None and 0 <= index - deepstack.first < len(deepstack.levels):
                hidden[deepstack.rows] += deepstack.levels[index - deepstack.first]
        return hidden, q

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return rms_norm(x, weight, eps, backend=self.layers_backend)

    def project_and_store(
        self, x: torch.Tensor, layer: LayerWeights, rotary: Pair, pools: Pair, plan: StepPlan
    ) -> torch.Tensor:
        """q, rotated, float [T, heads, head_dim]; rotated keys, and values, go into the layer's pools."""
        if self.deterministic:  # the bits of `project`: a stage of pruning begins with it in one step, not in another
            q, k, v = self.project(x, layer, *rotary)
            paged_attention.store_kv(k, v, *pools, plan, backend=self.attention_backend)
            return q
        qk, v = self.heads(x, layer)
        q, k = qk.split([self.spec.num_heads, self.spec.num_kv_heads], dim=1)
        cos, sin = rotary
        return rope_store_kv(q, k, v, cos[:, 0], sin[:, 0], *pools, plan.slots, backend=self.rope_backend)

    def project(self, x: torch.Tensor, layer: LayerWeights, cos: torch.Tensor, sin: torch.Tensor):
        """-> q [T, heads, head_dim], k and v [T, kv_heads, head_dim]; q and k rotated."""
        qk, v = self.heads(x, layer)
        q, k = rotate(qk, cos, sin).split([self.spec.num_heads, self.spec.num_kv_heads], dim=1)
        return q, k, v

    def heads(self, x: torch.Tensor, layer: LayerWeights) -> Pair:
        """-> q and k [T, heads + kv_heads, head_dim], v [T, kv_heads, head_dim]"""
        heads, kv_heads, head_dim = self.spec.num_heads, self.spec.num_kv_heads, self.spec.head_dim
        if len(layer.qkv) > 1:
            q, k, v = (self.linear(x, *part).unflatten(-1, (-1, head_dim)) for part in layer.qkv)
            qk = torch.cat([q, k], dim=1)
        else:
            qkv = self.linear(x, *layer.qkv[0]).unflatten(-1, (-1, head_dim))
            qk, v = qkv.split([heads + kv_heads, kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = qk.split([heads, kv_heads], dim=1)
            qk = torch.cat([self.norm(q, layer.q_norm, layer.eps), self.norm(k, layer.k_norm, layer.eps)], dim=1)
        return qk, v

    def mlp(self, x: torch.Tensor, layer: LayerWeights) -> torch.Tensor:
        if len(layer.gate_up) > 1:
            gate, up = (self.linear(x, *part) for part in layer.gate_up)
        else:
            gate, up = self.linear(x, *layer.gate_up[0]).chunk(2, dim=-1)
        return self.linear(self.elementwise(self.activation, gate) * up, *layer.down)

    def elementwise(self, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return elementwise(function, x) if self.deterministic else function(x)

    def rotary(self, positions: torch.Tensor, dtype: torch.dtype) -> Pair:
        """int64 [3, T] -> cos, signed sin [T, 1, head_dim], for `rotate`. Frequencies are the module's own buffer."""
        module = self.spec.decoder.rotary_emb
        frequencies = module.inv_freq.float()  # [head_dim / 2]
        planes = positions[:1] if self.rope_planes is None else positions[self.rope_planes]  # [1 or head_dim / 2, T]
        angles = planes.t().float() * frequencies  # [T, head_dim / 2]
        cos, sin = (self.elementwise(f, angles) * module.attention_scaling for f in (torch.cos, torch.sin))
        cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
        return cos[:, None].to(dtype), sin[:, None].to(dtype)
