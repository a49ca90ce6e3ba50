"""Names of parameters, as the releases of transformers write them."""

from __future__ import annotations

from collections.abc import Mapping


def resolve_name(name: str, params: Mapping[str, object]) -> str:
    """The module's own name of a parameter, for names of transformers 4.x and 5.x and of a LoRA model of `peft`.

    Raises ValueError if unknown.
    """
    own = name.removeprefix("base_model.model.")
    aliases = [own, f"model.{own}"]
    for old, new in (
        ("model.", "model.language_model."),
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
    ):
        if own.startswith(old):
            aliases.append(new + own[len(old) :])
    for alias in aliases:
        if alias in params:
            return alias
    raise ValueError(f"expected the name of a parameter of the model, got {name!r} (update_weights)")
