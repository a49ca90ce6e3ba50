"""What makes the host wait is named, wherever it hides; what does not is left alone."""

from __future__ import annotations

import pytest
import torch
from host_syncs import watch

CPU = torch.device("cpu")
X = torch.tensor([3.0, 0.0, 1.0])

WAITING = {
    "item": (lambda: X[0].item(), "aten._local_scalar_dense.default"),
    "int": (lambda: int(X[0]), "aten._local_scalar_dense.default"),
    "bool": (lambda: bool(X.any()), "aten._local_scalar_dense.default"),
    "branch": (lambda: 1 if X.sum() > 2 else 0, "aten._local_scalar_dense.default"),
    "nonzero": (lambda: X.nonzero(), "aten.nonzero.default"),
    "tolist": (lambda: X.tolist(), "Tensor.tolist"),
    "equal": (lambda: torch.equal(X, X + 0), "aten.equal.default"),
    "masked_select": (lambda: X.masked_select(X > 0), "aten.masked_select.default"),
    "mask as index": (lambda: X[X > 0], "aten.index.Tensor"),
    "mask as target": (lambda: X.clone().index_put_((X > 0,), X[:2]), "aten.index_put_.default"),
    "repeats": (lambda: torch.repeat_interleave(X, X.long()), "aten.repeat_interleave.Tensor"),
    "copy to another device": (lambda: X.to("meta"), "aten._to_copy.default"),
    "copy into another device": (lambda: torch.empty(3, device="meta").copy_(X), "aten.copy_.default"),
}


@pytest.mark.parametrize("case", WAITING)
def test_waiting_is_seen(case):
    run, name = WAITING[case]
    with watch(CPU) as found:
        run()
        run()
    assert found[name] == 2, found


WORKING = {
    "arithmetic": lambda: (X * 2).sum().clamp(max=3),
    "positions as index": lambda: X[torch.tensor([0, 2])],
    "where": lambda: torch.where(X > 0, X, 0.0),
    "copy that is not waited for": lambda: X.to("meta", non_blocking=True),
    "cast": lambda: X.to(torch.float64),
    "copy on one device": lambda: X.clone().copy_(X),
    "repeats of known number": lambda: torch.repeat_interleave(X, torch.tensor([1, 1, 2]), output_size=4),
    "gradient": lambda: X.clone().requires_grad_().sin().sum().backward(),
}


@pytest.mark.parametrize("case", WORKING)
def test_work_is_no_wait(case):
    with watch(CPU) as found:
        WORKING[case]()
    assert not found


def test_other_devices_do_not_count():
    with watch(torch.device("meta")) as found:
        X[0].item()
        X.tolist()
    assert not found


@pytest.fixture(params=["CPU", "CompositeExplicitAutograd"])
def peeking(request):
    """A kernel that is registered with torch, looks at a value in its Python code and copies to another device."""

    def peek(x: torch.Tensor) -> torch.Tensor:
        x.to("meta")
        x.to("meta", non_blocking=True)
        return x * x[0].item()

    # torch.ops keeps operators beyond their library: a namespace each.
    name = f"host_syncs_{request.param}"
    library = torch.library.Library(name, "DEF")
    library.define("peek(Tensor x) -> Tensor")
    library.impl("peek", peek, request.param)
    yield getattr(torch.ops, name).peek
    library._destroy()


def test_inside_a_registered_kernel(peeking):
    with watch(CPU) as found:
        assert torch.equal(peeking(X), 3 * X)
        peeking(X)
    assert found.pop("aten.equal.default") == 1
    assert found.total() == 4, found
    assert found["aten.item.default"] == 2


def test_synchronize_is_seen(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("ran"))
    with watch(CPU) as found:
        torch.cuda.synchronize()
    assert found == {"torch.cuda.synchronize": 1}
    assert calls == ["ran"]


def test_torch_is_left_as_it_was():
    before = torch.cuda.synchronize, torch.Tensor.tolist
    with pytest.raises(RuntimeError, match="inside"), watch(CPU):
        raise RuntimeError("inside")
    assert (torch.cuda.synchronize, torch.Tensor.tolist) == before
    with watch(CPU) as found:
        pass
    X[0].item()
    assert not found
