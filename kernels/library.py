"""Registers kernels as operators `torch.ops.foveate.*`, so that torch.compile, fake tensors and autograd know them."""

from __future__ import annotations

from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("foveate", "FRAGMENT")


def operator(
    schema: str,
    run: Callable,
    fake: Callable,
    *,
    save: Callable | None = None,
    backward: Callable | None = None,
) -> Callable:
    """Defines `foveate::<schema>` and returns it.

    run: the implementation on real tensors of every device. fake: outputs of the right shape and dtype for given
    shapes. save(ctx, inputs, output), backward(ctx, *grads): as torch.library.register_autograd takes them.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"foveate::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"foveate::{name}", backward, setup_context=save, lib=_LIBRARY)
    return getattr(torch.ops.foveate, name).default
