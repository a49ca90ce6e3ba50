"""Pruned rollouts in a trainer's own forward: the recorded plans, applied inside an unmodified transformers model.

Image tokens dropped at the encoder do not enter the decoder; merged ones are merged anew from the image features,
deepstack levels alike. Tokens dropped at a layer are no keys, queries or values there and behind. Kept tokens have
their recorded positions, token t of a completion stands at group.next_position + t. Selections are constants to the
gradient.

Logits and the last hidden state have the caller's shape. Rows of dropped tokens, and of padding, are those of a hidden
state of zeros, and take no gradient. Should the prompt end with a dropped image token, its row predicts the first token
of the completion all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch

from foveate.rollout import models
from foveate.rollout.checks import require
from foveate.rollout.models import ModelSpec
from foveate.rollout.prefix_groups import PADDING
from foveate.rollout.replay_layers import check_backend, staged, take
from foveate.rollout.replay_layout import Layout, begins_with, grids_of, lay_out
from foveate.rollout.replay_plan import PromptView, prompt_view
from foveate.rollout.types import RolloutGroup


@contextmanager
def replay(model: Any, groups: Sequence[RolloutGroup], *, rows: Sequence[int] | None = None) -> Iterator[None]:
    """Within it every forward of the model sees of each prompt what its group's `KeepPlan` kept, with gradients.

    >>> with foveate.replay(model, groups):
    ...     logits = model(input_ids=ids, attention_mask=mask, pixel_values=pixels, image_grid_thw=grids).logits

    model: a transformers vision-language model, or a `peft` LoRA model of one. groups: as the engine returned them,
    pruned or not. A forward takes input_ids and attention_mask [R, L], padded on either side, pixel_values and
    image_grid_thw of all rows' images in order, all by keyword; a row is a group's whole prompt, placeholders expanded,
    and a completion of any length. rows: the group of each row of every forward inside, by its place in `groups`; None
    finds it by the prompt, which then must be one group's alone. position_ids are replaced. No cache is made; eager,
    sdpa, flex_attention and flash attention can drop tokens. The backward may run when the context has ended, with
    gradient checkpointing too. An engine on the model refuses to run inside. On leaving, also by an exception, the
    model is as before.

    Raises ValueError, in the forward, for a row that is not its group's or has several, other image grids, a cache,
    hidden states or attentions that are asked for; here, for a plan that is not the prompt's, a model without a tower
    or in a replay already, and an attention that cannot drop tokens inside the decoder.
    """
    spec = models.describe(model)
    require(spec.vision is not None, "a model with a vision tower", type(spec.model).__name__, "model")
    views = [prompt_view(group, spec.vision) for group in groups]
    if any(view.seen_from for view in views):
        check_backend(spec)
    active = isinstance(spec.decoder.__dict__.get("forward"), _Replay)
    require(not active, "a model outside of a replay", "a second one", "model")
    with _installed(_Replay(spec, groups, views, rows)):
        yield


class _Replay:
    """Stands for the decoder's forward; `lay_out` runs before the forward of the module around it."""

    def __init__(
        self, spec: ModelSpec, groups: Sequence[RolloutGroup], views: Sequence[PromptView], rows: Sequence[int] | None
    ):
        self.spec, self.groups, self.views, self.rows = spec, list(groups), list(views), rows
        self.forward: Callable[..., Any] = spec.decoder.forward
        self._next: Layout | None = None  # from the outer forward to the decoder's, which it calls

    def lay_out(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict]:
        """Finds the rows' groups, and gives all tokens their positions."""
        self._next = None
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if args or ids is None:
            raise ValueError(f"expected input_ids and all else by keyword, got {sorted(kwargs)} (arguments)")
        mask = torch.ones_like(ids) if mask is None else mask
        require(mask.shape == ids.shape, f"{list(ids.shape)}", list(mask.shape), "attention_mask")
        rows = [own[there.bool()] for own, there in zip(ids.cpu(), mask.cpu(), strict=True)]
        indices = self._groups_of(rows)
        self._check_images(indices, kwargs)
        assert self.spec.vision is not None, self.spec.path
        pairs = [(self.groups[index], self.views[index]) for index in indices]
        self._next = lay_out(pairs, ids.cpu(), mask.bool().cpu(), self.spec.vision)
        return args, {**kwargs, "position_ids": self._next.positions.to(ids.device)}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layout, self._next = self._next, None
        require(layout is not None, "a forward of the whole model", "one of its decoder", "model")
        assert layout is not None, self
        require(kwargs.get("past_key_values") is None, "no cache", "past_key_values", "past_key_values")
        embeds = kwargs["inputs_embeds"]
        device, (count, length) = embeds.device, embeds.shape[:2]
        columns, segments = layout.columns.to(device), layout.segments.to(device)
        changed = self._images(layout, embeds, kwargs) if bool(layout.is_image.any()) else {}
        changed |= {
            "inputs_embeds": changed.get("inputs_embeds", take(embeds, columns)),
            "position_ids": take(kwargs["position_ids"][..., None], columns)[..., 0],
            "attention_mask": (segments != PADDING).long(),
            "use_cache": False,
        }
        with staged(self.spec, layout.stages):
            output = self.forward(*args, **{**kwargs, **changed})
        asked = [name for name in ("hidden_states", "attentions") if getattr(output, name, None) is not None]
        require(not asked, "the last hidden state alone to be asked for", asked, "output")
        hidden = output.last_hidden_state
        whole = hidden.new_zeros(count, length, hidden.shape[-1])
        rows, slots, places = (index.to(device) for index in (layout.rows, layout.slots, layout.places))
        whole[rows, places] = hidden[rows, slots]
        output.last_hidden_state = whole
        return output

    def _groups_of(self, rows: list[torch.Tensor]) -> list[int]:
        if self.rows is None:
            return [self._find(index, ids) for index, ids in enumerate(rows)]
        require(len(self.rows) == len(rows), f"a group for each of {len(rows)} rows", len(self.rows), "rows")
        for row, (index, ids) in enumerate(zip(self.rows, rows, strict=True)):
            require(0 <= index < len(self.groups), f"an index of {len(self.groups)} groups", index, "rows")
            group = self.groups[index]
            same = begins_with(ids, group)
            require(same, f"request {group.request_id!r}: its prompt in row {row}", "others", "input_ids")
        return list(self.rows)

    def _find(self, row: int, ids: torch.Tensor) -> int:
        found = {id(group): index for index, group in enumerate(self.groups) if begins_with(ids, group)}
        names = [self.groups[index].request_id for index in found.values()]
        known = [group.request_id for group in self.groups]
        require(len(found) > 0, f"row {row} to begin with the prompt of one of requests {known}", "none", "input_ids")
        require(len(found) == 1, f"rows, because the prompt of row {row} is of several requests", names, "rows")
        return next(iter(found.values()))

    def _check_images(self, indices: list[int], kwargs: dict[str, Any]) -> None:
        """The images of the forward are those of the rows' groups, as far as their sizes tell."""
        grids, given = [grids_of(self.groups[index]) for index in indices], kwargs.get("image_grid_thw")
        got = [] if given is None else given.tolist()
        names = sorted({self.groups[index].request_id for index in indices})
        expected = [grid for own in grids for grid in own]
        require(got == expected, f"requests {names}: grids {expected}", got, "image_grid_thw")
        there = not expected or kwargs.get("pixel_values") is not None
        require(there, f"requests {names}: patches of {len(expected)} images", None, "pixel_values")

    def _images(self, layout: Layout, embeds: torch.Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Embeddings of the tokens that enter, their images merged, and the deepstack levels that go with them."""
        is_image, columns = layout.is_image.to(embeds.device), layout.columns.to(embeds.device)
        levels = [embeds[is_image], *(kwargs.get("deepstack_visual_embeds") or ())]
        stacked = torch.stack([level.to(embeds.dtype) for level in levels], dim=1)
        features = iter(stacked.split(list(chain.from_iterable(layout.sizes))))
        parts = [
            view.image_rows([next(features) for _ in sizes])
            for view, sizes in zip(layout.views, layout.sizes, strict=True)
            if sizes
        ]
        rows = torch.cat(parts)  # [image tokens that enter, 1 + deepstack levels, hidden]
        enters = is_image.gather(1, columns) & (layout.segments.to(embeds.device) != PADDING)
        changed: dict[str, Any] = {"inputs_embeds": take(embeds, columns).masked_scatter(enters[..., None], rows[:, 0])}
        if len(levels) > 1:
            changed |= {"visual_pos_masks": enters, "deepstack_visual_embeds": list(rows[:, 1:].unbind(1))}
        return changed


@contextmanager
def _installed(state: _Replay) -> Iterator[None]:
    """The state stands for the decoder's forward, in the instance's own dictionary; what stood there comes back."""
    decoder = state.spec.decoder
    before = decoder.__dict__.get("forward")
    hook = state.spec.model.model.register_forward_pre_hook(state.lay_out, with_kwargs=True)
    decoder.forward = state
    try:
        yield
    finally:
        hook.remove()
        del decoder.forward
        if before is not None:
            decoder.forward = before
