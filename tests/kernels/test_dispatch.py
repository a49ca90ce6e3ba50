"""Which backend runs: the request, the environment, the best there; never another one than was asked for."""

from __future__ import annotations

import pytest
import torch

from foveate import _C
from foveate.kernels import dispatch
from foveate.kernels.dispatch import available, choose, choose_among, explain, for_family

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("FOVEATE_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def with_cuda(monkeypatch):
    monkeypatch.setattr(_C, "CUDA_VERSION", "13.0")


def test_best_backend_of_each_device(monkeypatch, with_cuda):
    assert choose("layers") == choose("layers", device=CPU) == "cpp"
    assert choose("layers", device=CUDA) == "cuda"
    monkeypatch.setattr(_C, "CUDA_VERSION", None)
    assert choose("layers", device=CUDA) == "triton"
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    assert choose("layers", device=CUDA) == "reference"


def test_available(monkeypatch, with_cuda):
    assert available("layers", CPU) == ("cpp", "reference")
    assert available("layers", CUDA) == ("cuda", "triton", "reference")
    assert available("paged_attention", CUDA) == ("cuda", "reference")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "triton" in available("layers", CPU)
    assert choose("layers") == "cpp"  # the interpreter only where it is asked for
    assert choose("layers", "triton") == "triton"


@pytest.mark.parametrize(
    ("family", "backend", "device", "reason"),
    [
        ("layers", "cuda", CPU, "it runs on CUDA tensors"),
        ("layers", "cpp", CUDA, "it runs on CPU tensors"),
        ("layers", "triton", CPU, "it runs on CUDA tensors"),
        ("paged_attention", "triton", CUDA, "paged_attention has only reference, cpp, cuda"),
        ("layers", "numpy", CPU, "the backends are reference, cpp, triton, cuda"),
    ],
)
def test_a_request_never_falls_back(monkeypatch, with_cuda, family, backend, device, reason):
    message = rf"expected a backend of {family} for {device}, got '{backend}': {reason}"
    with pytest.raises(ValueError, match=rf"{message} \(backend\)"):
        choose(family, backend, device)
    monkeypatch.setenv("FOVEATE_BACKEND", backend)
    with pytest.raises(ValueError, match=rf"{message} \(FOVEATE_BACKEND\)"):
        choose(family, None, device)


def test_extension_without_cuda(monkeypatch):
    monkeypatch.setattr(_C, "CUDA_VERSION", None)
    with pytest.raises(ValueError, match=r"foveate\._C was built without CUDA"):
        choose("layers", "cuda", CUDA)


def test_environment_and_its_rank(monkeypatch):
    monkeypatch.setenv("FOVEATE_BACKEND", "reference")
    assert choose("layers") == "reference"
    assert choose("layers", "cpp") == "cpp"
    monkeypatch.setenv("FOVEATE_BACKEND", "")
    assert choose("layers") == "cpp"


def test_backends_by_family(monkeypatch):
    monkeypatch.setenv("FOVEATE_BACKEND", "layers=reference, sampling=reference")
    assert choose("layers") == choose("sampling") == "reference"
    assert choose("paged_attention") == "cpp"
    assert choose("layers", "sampling=reference") == "cpp"  # nothing asked for layers
    for wrong in ("layer=cpp", "layers=", "layers=cpp,triton"):
        with pytest.raises(ValueError, match=r"expected family=backend.*\(backend\)"):
            choose("layers", wrong)


def test_an_operation_with_some_of_its_family(monkeypatch, with_cuda):
    """The environment and "family=name" speak of the family, a name alone of the operation."""
    assert choose_among(("triton", "reference"), "op", "layers") == "reference"  # not the interpreter
    assert choose_among(("triton", "reference"), "op", "layers", device=CUDA) == "triton"
    assert choose_among(("cpp", "reference"), "op", "layers", device=CUDA) == "reference"
    assert choose_among(("cuda", "cpp"), "op", "layers", "sampling=reference") == "cpp"
    with pytest.raises(
        ValueError, match=r"expected one of \('triton', 'reference'\), which op has, got 'cpp' \(backend\)"
    ):
        choose_among(("triton", "reference"), "op", "layers", "cpp")
    for asked in ("layers=cpp", "sampling=reference,layers=cpp", for_family("layers", "cpp")):
        assert choose_among(("reference",), "op", "layers", asked) == "reference"
        assert choose_among(("reference",), "op", "layers", asked, dtype=torch.float64) == "reference"
        with pytest.raises(ValueError, match="it runs on CPU tensors"):
            choose_among(("reference",), "op", "layers", asked, CUDA)
    assert for_family("layers", None) is None
    assert for_family("layers", "sampling=cpp") == "sampling=cpp"
    with pytest.raises(ValueError, match="it runs on CPU tensors"):
        choose_among(("cpp",), "op", "layers", "cpp", CUDA)
    monkeypatch.setenv("FOVEATE_BACKEND", "layers=cpp")
    assert choose_among(("reference",), "op", "layers") == "reference"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_among(("triton", "reference"), "op", "layers") == "reference"


def test_explanations_name_what_is_missing(monkeypatch, with_cuda):
    assert explain("layers", CPU) == "cpp, the best for cpu"
    assert explain("paged_attention", CUDA) == "cuda, the best for cuda"
    monkeypatch.setattr(_C, "CUDA_VERSION", None)
    assert explain("layers", CUDA) == "triton (cuda: foveate._C was built without CUDA)"
    monkeypatch.setenv("FOVEATE_BACKEND", "reference")
    assert explain("layers", CPU) == "reference: FOVEATE_BACKEND asks for it"


def test_unknown_family():
    with pytest.raises(KeyError):
        choose("layer")
