"""`foveate doctor`: what was found, which backend serves each kernel family and why, and a self-test in seconds."""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from foveate import _C
from foveate.kernels import dispatch, layers, paged_attention, policy_loss, sampling, vision_prune
from foveate.kernels.sampling import philox

PACKAGES = ("foveate", "torch", "triton", "transformers", "numpy", "safetensors", "flash-attn")


@dataclass(frozen=True)
class Check:
    """One line of the report. ok: None where there is nothing to pass or fail."""

    section: str
    name: str
    detail: str
    ok: bool | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the report; returns 1 if a check failed, else 0. `--plan` prints another, of memory and time."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--plan" in given:
        from foveate.rollout.tools import plan_command

        return plan_command.main([word for word in given if word != "--plan"])
    parser = argparse.ArgumentParser(prog="foveate doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object a line, for programs")
    parser.add_argument("--plan", action="store_true", help="instead: what fits on which GPU; --plan --help says more")
    options = parser.parse_args(given)
    failed = False
    section = None
    for check in examine():
        failed |= check.ok is False
        if options.json:
            print(json.dumps(asdict(check)), flush=True)
            continue
        if check.section != section:
            section = check.section
            print(f"\n{section}")
        mark = {None: " ", True: "+", False: "!"}[check.ok]
        print(f" {mark} {check.name:<24} {check.detail}", flush=True)
    if not options.json:
        print("\nsomething is wrong, see the lines marked with !" if failed else "\nall is well")
    return int(failed)


def examine() -> Iterator[Check]:
    """Every line of the report, in order; a self-test that raises is a failed check, not the end of the report."""
    yield from _found()
    devices = _devices()
    for device in devices:
        for family in dispatch.FAMILIES:
            yield _guarded(f"backends on {device}", family, partial(dispatch.explain, family, device), ok=None)
    for device in devices:
        for name, test in _SELF_TESTS.items():
            yield _guarded(f"self-test on {device}", name, partial(_timed, test, device))


def _found() -> Iterator[Check]:
    def line(name: str, detail: str, ok: bool | None = None) -> Check:
        return Check("found", name, detail, ok)

    yield line("python", f"{platform.python_version()} on {platform.machine()}")
    for package in PACKAGES:
        yield line(package, _version(package))
    cuda = f"CUDA {_C.CUDA_VERSION} for sm_{', sm_'.join(_C.CUDA_ARCHS.split())}" if _C.CUDA_VERSION else "without CUDA"
    yield line("foveate._C", f"built with {_C.COMPILER}, {cuda}")
    yield line("nvcc", shutil.which("nvcc") or "not on the path")
    yield line("NVIDIA driver", _driver())
    for index in range(torch.cuda.device_count()):
        yield _gpu(index)


def _gpu(index: int) -> Check:
    properties = torch.cuda.get_device_properties(index)
    chip = f"{properties.major}{properties.minor}"
    # A cubin serves its own major version; with the suffix "a" its very chip alone.
    built = [arch for arch in _C.CUDA_ARCHS.split() if arch == f"{chip}a" or _serves(arch, properties)]
    detail = f"{properties.name}, sm_{chip}, {properties.total_memory / 2**30:.0f} GiB"
    if not _C.CUDA_VERSION:
        return Check("found", f"cuda:{index}", f"{detail}; foveate._C has no CUDA kernels, Triton serves it")
    if not built:
        return Check("found", f"cuda:{index}", f"{detail}; foveate._C was not built for it: FOVEATE_CUDA_ARCHS", False)
    return Check("found", f"cuda:{index}", f"{detail}; runs the code for sm_{built[-1]}", True)


def _serves(arch: str, properties) -> bool:
    if not arch.isdigit():
        return False
    major, minor = divmod(int(arch), 10)
    return major == properties.major and minor <= properties.minor


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "no nvidia-smi"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return result.stdout.strip().splitlines()[0] if result.returncode == 0 else "nvidia-smi found none"


def _devices() -> list[torch.device]:
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def _guarded(section: str, name: str, run: Callable[[], str], ok: bool | None = True) -> Check:
    try:
        return Check(section, name, run(), ok)
    except Exception as error:  # the report goes on: each line stands for itself
        return Check(section, name, f"{type(error).__name__}: {error}", False)


def _timed(test: Callable[[torch.device], str], device: torch.device) -> str:
    start = time.perf_counter()
    detail = test(device)
    return f"{detail} in {time.perf_counter() - start:.2f} s"


def _expect(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(what)


def _test_layers(device: torch.device) -> str:
    x, weight = (
        torch.randn(size, generator=torch.Generator().manual_seed(0), device="cpu").to(device)
        for size in ((5, 300), (300,))
    )
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    backends = dispatch.available("layers", device)
    for backend in backends:
        error = (layers.rms_norm(x, weight, 1e-6, backend=backend) - exact).abs().max().item()
        _expect(error < 1e-5, f"rms_norm of {backend} is off by {error:.1e}")
    return f"rms_norm of {', '.join(backends)}"


def _test_sampling(device: torch.device) -> str:
    """The words that the docstring of `kernels.sampling` prints, and a draw that can have one result only."""
    words = philox.noise_words(torch.tensor([0x0123456789ABCDEF], device=device), torch.tensor([2], device=device), 5)
    _expect(f"{int(words[0, 4]) & 0xFFFFFFFF:08x}" == "9aa81b3e", "the noise is not Philox4x32-10")
    logits = torch.tensor([[0.0, 9.0, -torch.inf]], device=device)
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    drawn = sampling.sample(logits, temperature=0.0, seeds=zero, steps=zero)
    _expect(drawn.token_ids.tolist() == [1], "temperature 0 did not take the largest logit")
    return "noise and a greedy draw"


def _test_attention(device: torch.device) -> str:
    """Three keys in one page; the value of a token is its place, the scores are equal: the mean is 1."""
    import numpy as np

    def array(*values: int) -> np.ndarray:
        return np.array(values, np.int32)

    plan = paged_attention.StepPlan(
        torch.tensor([2], device=device), array(0), array(0, 1), array(3), array(0), array(0, 1), array(0),
        np.array([True]), page_size=4,
    )  # fmt: skip
    keys, values = torch.zeros(1, 4, 1, 8, device=device), torch.full((1, 4, 1, 8), torch.nan, device=device)
    values[0, :2, 0] = torch.arange(2.0, device=device)[:, None]
    new = torch.full((1, 1, 8), 2.0, device=device)
    paged_attention.store_kv(torch.zeros_like(new), new, keys, values, plan)
    out = paged_attention.decode(torch.ones(1, 2, 8, device=device), keys, values, plan, scale=1.0)
    _expect(torch.allclose(out, torch.ones_like(out)), f"expected a mean of 1, got {out.flatten()[0].item()}")
    return "a step over one page"


def _test_prune(device: torch.device) -> str:
    """Two of four tokens and one of two; the first among equals."""
    scores = torch.tensor([0.5, 2.0, 0.5, -1.0, 3.0, 4.0], device=device)
    offsets, counts = (torch.tensor(values, dtype=torch.int32, device=device) for values in ((0, 4, 6), (2, 1)))
    kept = vision_prune.select_topk(scores, offsets, counts).indices.tolist()
    _expect(kept == [0, 1, 1], f"expected tokens 0 and 1, and 1, got {kept}")
    return "the tokens of the highest scores"


def _test_loss(device: torch.device) -> str:
    offsets = torch.tensor([0, 4], dtype=torch.int32, device=device)
    rewards = torch.tensor([0.0, 0.0, 1.0, 1.0], device=device)
    advantages = policy_loss.group_advantage(rewards, offsets)
    _expect(bool((advantages.sign() == rewards * 2 - 1).all()), "the better half of a group has no advantage")
    hidden = torch.ones(1, 2, device=device, requires_grad=True)
    head, zero = torch.eye(2, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    out = policy_loss.linear_policy_loss(
        hidden, head, zero, advantages=torch.ones(1, device=device), sequence_ids=zero.int(), denominator=1.0
    )
    out.loss.backward()
    assert hidden.grad is not None
    error = (hidden.grad.cpu() - torch.tensor([[-0.5, 0.5]], device="cpu")).abs().max().item()
    _expect(error < 1e-6, f"the gradient of two equal logits is off by {error:.1e}")
    return "advantages of a group, gradient of a loss"


def _test_engine(device: torch.device) -> str:
    """Greedy tokens of a random tiny Llama equal those of transformers."""
    from foveate.rollout.config import EngineConfig, SamplingParams
    from foveate.rollout.engine import Engine
    from foveate.rollout.testing import tiny_model
    from foveate.rollout.types import Request

    model: Any = tiny_model("llama").to(device)
    prompt = torch.arange(1, 9, device="cpu")
    sampling_params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    engine = Engine(model, None, EngineConfig(kv_memory=1 << 22))
    (group,) = engine.generate([Request(prompt, n=2, sampling=sampling_params)], strict=True)
    ids = prompt[None].to(device)
    mask = torch.ones_like(ids)
    theirs = model.generate(ids, attention_mask=mask, do_sample=False, min_new_tokens=8, max_new_tokens=8)[
        0, 8:
    ].tolist()
    for rollout in group.rollouts:
        _expect(list(rollout.token_ids) == theirs, f"tokens {list(rollout.token_ids)}, transformers' are {theirs}")
    return "8 greedy tokens, those of transformers"


_SELF_TESTS: dict[str, Callable[[torch.device], str]] = {
    "layers": _test_layers,
    "sampling": _test_sampling,
    "paged_attention": _test_attention,
    "policy_loss": _test_loss,
    "vision_prune": _test_prune,
    "engine": _test_engine,
}
