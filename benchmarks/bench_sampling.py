"""Drawing tokens from logits and from hidden states; run as `python benchmarks/bench_sampling.py`.

Peers do less. `multinomial` is torch's softmax and multinomial, which draw by the same distribution without filters but
return no log-prob, kept mass or entropy, and know no seed of a row. `linear` is the LM head's product alone, the floor
of `sample_from_hidden`. Logits are normal with standard deviation 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import floors
import torch
import torch.nn.functional as F
from common import Options, backends_of, main
from measurement import Measurement, Results
from samplers import Inputs

from foveate.kernels import sampling

KERNELS = ("sample", "sample_from_hidden")
SPREAD = 3.0
FILTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "greedy": {"temperature": 0.0},
    "top_k": {"top_k": 50},
    "top_p": {"top_p": 0.9},
    "min_p": {"min_p": 0.05},
    "banned": {},
}
BANNED = [3, 17, 20]


def check_draw(
    exact_logits: torch.Tensor, plain_logits: torch.Tensor, results: Results, case: str, room: float
) -> None:
    """Values of the drawn tokens against a float64 log-softmax, which shares no code with the kernels.

    A log-prob may err by d: twice what the plain float32 logits do, one rounding each of z, of the logarithm of the
    sum and of their difference, and log2(V) of the sum, with 4 more for exp and log. The entropy -sum p log p is then
    off by at most d (1 + entropy).
    """
    token_ids, logprobs, log_kept, entropy = results
    assert bool(((token_ids >= 0) & (token_ids < exact_logits.shape[1])).all()), f"token ids {token_ids.tolist()}"
    if case == "greedy":
        assert torch.equal(token_ids, plain_logits.argmax(-1)), "greedy tokens are not the first maxima"
    if case in ("plain", "temperature", "greedy"):
        assert not log_kept.count_nonzero().item(), f"log_kept {log_kept.tolist()}, expected 0: nothing was removed"
    temperature = FILTERS[case].get("temperature", 1.0) or 1.0
    z = exact_logits / temperature
    lse, exact = z.logsumexp(-1), z.log_softmax(-1)
    roundings = 2 * z.abs().amax(-1) + lse.abs() + math.log2(z.shape[1]) + 4
    errors = 2 * (plain_logits - exact_logits).abs().max() / temperature
    allowed = room * (torch.finfo(torch.float32).eps * roundings + errors)
    expected = -(exact.exp() * exact).sum(-1)
    _assert_near("logprobs", logprobs, exact.gather(-1, token_ids[:, None])[:, 0], allowed)
    _assert_near("entropy", entropy, expected, allowed * (1 + expected))


def _assert_near(name: str, got: torch.Tensor, exact: torch.Tensor, allowed: torch.Tensor) -> None:
    error = (got.double() - exact).abs()
    wrong = (~(error <= allowed)).nonzero().flatten().tolist()  # NaN is wrong, too
    assert not wrong, f"{name} of row {wrong[0]}: error {error[wrong[0]]:.3g}, allowed {allowed[wrong[0]]:.3g}"


def logits_inputs(rows: int, vocab: int, generator: torch.Generator) -> Inputs:
    """logits, seeds, steps, banned"""
    device = generator.device
    logits = torch.randn(rows, vocab, device=device, generator=generator) * SPREAD
    seeds, steps = torch.randint(0, 2**32, (2, rows), device=device, generator=generator)
    banned = torch.zeros(vocab, dtype=torch.bool, device=device)
    banned[BANNED] = True
    return logits, seeds, steps, banned


def from_logits(backend: str, case: str, logits, seeds, steps, banned) -> sampling.SampleOutput:
    arguments = {"temperature": 1.0, **FILTERS[case], "banned": banned if case == "banned" else None}
    return sampling.sample(logits, **arguments, seeds=seeds, steps=steps, backend=backend)


def multinomial(logits: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    return torch.multinomial(torch.softmax(logits, -1), 1)


def check_logits(case: str, inputs: Inputs, results: Results, room: float) -> None:
    check_draw(inputs[0].double(), inputs[0], results, case, room)
    if case == "banned":
        assert not bool(inputs[3][results[0]].any()), "a banned token was drawn"


def hidden_inputs(rows: int, dim: int, vocab: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """hidden, lm_head, seeds, steps"""
    draw = partial(torch.randn, device=generator.device, generator=generator)
    seeds, steps = torch.randint(0, 2**32, (2, rows), device=generator.device, generator=generator)
    return draw(rows, dim).to(dtype), (draw(vocab, dim) * SPREAD * dim**-0.5).to(dtype), seeds, steps


def from_hidden(backend: str, hidden, lm_head, seeds, steps) -> sampling.SampleOutput:
    return sampling.sample_from_hidden(hidden, lm_head, temperature=1.0, seeds=seeds, steps=steps, backend=backend)


def check_hidden(inputs: Inputs, results: Results, room: float) -> None:
    hidden, lm_head = inputs[:2]
    exact, plain = F.linear(hidden.double(), lm_head.double()), F.linear(hidden.float(), lm_head.float())
    check_draw(exact, plain, results, "plain", room)


def measurements(options: Options) -> Iterator[Measurement]:
    backends = backends_of("sampling", options.device)
    on_gpu = options.device.type == "cuda"
    shapes = [(8, 49_152), (8, 151_936), (64, 151_936), (128, 62)] + ([(256, 151_936)] if on_gpu else [])
    for rows, vocab in [(4, 62)] if options.quick else shapes:
        for case in FILTERS:
            yield Measurement(
                kernel="sample",
                shape={"N": rows, "V": vocab, "case": case},
                dtype=torch.float32,
                make_inputs=partial(logits_inputs, rows, vocab),
                backends={name: partial(from_logits, name, case) for name in backends if name != "triton"},
                check=partial(check_logits, case),
                floor=floors.sample(rows, vocab, itemsize=4),
                peers={"multinomial": multinomial},
                check_peers=False,
            )
    dtype = torch.bfloat16 if on_gpu else torch.float32
    heads = [(1, 2048, 151_936), (64, 2048, 151_936), (256, 2048, 151_936)] if on_gpu else [(8, 576, 49_152)]
    for rows, dim, vocab in [(4, 32, 62)] if options.quick else heads:
        yield Measurement(
            kernel="sample_from_hidden",
            shape={"N": rows, "D": dim, "V": vocab},
            dtype=dtype,
            make_inputs=partial(hidden_inputs, rows, dim, vocab, dtype),
            backends={name: partial(from_hidden, name) for name in backends},
            check=check_hidden,
            floor=floors.sample_from_hidden(rows, dim, vocab, dtype.itemsize),
            peers={"linear": lambda hidden, lm_head, *_: F.linear(hidden, lm_head)},
            check_peers=False,
        )


if __name__ == "__main__":
    raise SystemExit(main(__doc__, KERNELS, measurements))
