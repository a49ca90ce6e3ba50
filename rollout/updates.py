"""New weights for a running engine: what is checked, what becomes of unfinished requests, which version counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from foveate.rollout.checks import require
from foveate.rollout.models.named import Manifest, NamedTensors

if TYPE_CHECKING:
    from foveate.rollout.engine import Engine

IN_FLIGHT = ("error", "abort", "keep")


class Updates:
    """What an engine offers to whoever changes its weights."""

    def update_weights(  # type: ignore[misc]
        self: Engine,
        named: NamedTensors = (),
        *,
        manifest: Manifest | None = None,
        partial: bool = False,
        in_flight: Literal["error", "abort", "keep"] = "error",
        vision_changed: bool | None = None,
    ) -> int:
        """Makes the engine use changed weights, and returns the new `weight_version`.

        named: empty after the module's parameters were changed in place; else tensors by name (the module's own, or
        transformers' 4.x and 5.x names; tied parameters may come under each, with equal values), of any floating
        dtype. A mapping, list or tuple is checked whole before the first copy. Any other iterable is a stream: each
        item is checked, copied and let go before the next is asked for. manifest: {name: (shape, dtype)} of all that
        comes, checked whole before the first copy. Missing names are an error unless partial.

        in_flight: what becomes of unfinished requests. "error" refuses the update, "abort" ends them with what they
        have. "keep" lets them go on under the new weights with the keys and values they have
        (`Rollout.weight_versions`, `RolloutGroup.weight_version`); samples beyond what the KV memory could hold to
        their last token give up theirs, last first, as under any shortage, and are computed anew under the new
        weights. vision_changed: None means yes if a named tensor belongs to the tower or, without names, if a
        parameter of the tower requires a gradient.

        Raises ValueError. If a check before the first copy fails, nothing has changed; if a stream or a copy breaks
        off, the versions stay and steps raise ValueError until a complete update, while requests wait.
        """
        require(in_flight in IN_FLIGHT, f"one of {IN_FLIGHT}", in_flight, "in_flight")
        with self._desk.turn():
            self._desk.require_no_step("update_weights")
            names = sorted(self._desk.groups)
            if names and in_flight == "error":
                raise ValueError(f"expected no unfinished requests, got {len(names)}: {names[:3]} (in_flight)")
            update = self._weights.plan(named, manifest, partial, vision_changed)
            if in_flight == "abort":
                self._desk.abort_all()
            return _begin_version(self, self._weights.apply(update, vision_changed))


def _begin_version(engine: Engine, changes_vision: bool) -> int:
    """Lets nothing of the old weights be found any more; returns the new version."""
    vision, versions = engine._runner.vision if changes_vision else None, engine._versions
    engine._scheduler.keep(versions.weights, changes_vision=vision is not None)
    versions.weights += 1
    if vision is not None:
        versions.vision += 1
        vision.clear(versions.vision)
    return versions.weights
