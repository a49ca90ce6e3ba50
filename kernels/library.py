"""Registers kernels as operators `torch.ops.foveate.*`, so that torch.compile, fake tensors and autograd know them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import _profiler_enabled

_LIBRARY = torch.library.Library("foveate", "FRAGMENT")
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_num_modes = torch._C._len_torch_dispatch_stack
_transform = torch._C._functorch.peek_interpreter_stack  # None outside vmap, grad, functionalize, ...
_is_tracing = torch._C._is_tracing  # torch.jit.trace


def is_observed(*tensors: torch.Tensor) -> bool:
    """Whether anything follows torch's operators: what `is_traced` knows, or a profiler, which shows them by name.

    Where nothing does, and no gradient is wanted, an operator's implementation can be called by itself, which costs a
    third. Elsewhere such a call would be left out of the trace, its result being memory that nothing has written.
    """
    return is_traced(*tensors) or _profiler_enabled()  # which torch.compile cannot look into


def is_traced(*tensors: torch.Tensor) -> bool:
    """Whether torch.compile, a trace, a dispatch mode, a transform or a subclass stands between caller and values."""
    if torch.compiler.is_compiling() or _num_modes() or _transform() is not None or _is_tracing():
        return True
    for tensor in tensors:  # noqa: SIM110 - a generator would take as long as all the rest
        if type(tensor) not in _PLAIN:
            return True
    return False


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
