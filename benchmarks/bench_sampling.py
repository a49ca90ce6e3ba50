"""Drawing tokens from logits and from hidden states; run as `python benchmarks/bench_sampling.py`.

Peers do less: none returns log-prob, kept mass and entropy, and none takes a seed for each row. In case `banned` they
write -inf over the banned ids of a copy of the logits. `torch` is softmax, a filter by sorting where one is asked for,
and multinomial; `compile` the same compiled; `flashinfer` its sampler from logits or probabilities. From hidden states:
`linear` is the LM head's product alone, the floor; `gumbel` the product and one pass of Gumbel-max as FlashSampling
draws, unfused, `gumbel_compile` the same compiled; `slabs` cuts to top-k slab by slab, then draws among what is left,
and never holds all logits. What is not installed is left out. Logits are normal with standard deviation 3.

On a GPU the kernels are called by their operators, with parameters on the device: `sample` itself looks at seeds and
steps, which waits for the GPU, and no graph could be captured. From hidden states `cuda` is Hopper's kernel, on
other chips `product`: the LM head's product in fp32 and `sample`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import floors
import torch
import torch.nn.functional as F
from common import Options, backends_of, main
from measurement import Measurement, Results
from samplers import Inputs, Run

from foveate.kernels import sampling
from foveate.kernels.sampling import masks, operators

KERNELS = ("sample", "sample_from_hidden")
SPREAD = 3.0
FILTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "greedy": {"temperature": 0.0},
    "top_k": {"top_k": 50},
    "top_p": {"top_p": 0.9},
    "top_k_top_p": {"top_k": 50, "top_p": 0.9},
    "min_p": {"min_p": 0.05},
    "banned": {},
}
FROM_HIDDEN, UNFUSED = ("plain", "top_k_top_p"), ("cpp", "reference")
BANNED, SLAB = [3, 17, 20], 8192  # ids; how many


def check_draw(
    exact_logits: torch.Tensor, plain_logits: torch.Tensor, results: Results, case: str, room: float
) -> None:
    """Values of the drawn tokens against a float64 log-softmax, which shares no code with the kernels.

    A log-prob may err by d: twice what the plain float32 logits do, one rounding each of z, of the logarithm of the
    sum and of their difference, and log2(V) of the sum, with 4 more for exp and log. The entropy -sum p log p is then
    off by at most d (1 + entropy). A filtered token must lie in the kept set, up to d at its border.
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
    drawn = exact.gather(-1, token_ids[:, None])
    _assert_near("logprobs", logprobs, drawn[:, 0], allowed)
    _assert_near("entropy", entropy, expected, allowed * (1 + expected))
    _assert_kept(exact, drawn, allowed[:, None], **FILTERS[case])


def _assert_kept(exact, drawn, allowed, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, **_: float) -> None:
    """exact: float64 [N, V], log-softmax. drawn: [N, 1], that of the tokens. allowed: [N, 1], error of both."""
    above = exact > drawn + allowed
    count, share = above.sum(-1), torch.where(above, exact.exp(), 0.0).sum(-1)
    assert not top_k or bool((count < top_k).all()), f"{count.tolist()} ids before the token, top_k {top_k}"
    if top_k:
        share = share / exact.topk(min(top_k, exact.shape[1]), -1).values.exp().sum(-1)
    assert bool((share <= top_p + allowed[:, 0]).all()), f"mass {share.tolist()} before the token, top_p {top_p}"
    floor = exact.amax(-1, keepdim=True) + math.log(min_p or 5e-324) - allowed
    assert bool((drawn >= floor).all()), f"a token below min_p {min_p}"


def _assert_near(name: str, got: torch.Tensor, exact: torch.Tensor, allowed: torch.Tensor) -> None:
    error = (got.double() - exact).abs()
    wrong = (~(error <= allowed)).nonzero().flatten().tolist()  # NaN is wrong, too
    assert not wrong, f"{name} of row {wrong[0]}: error {error[wrong[0]]:.3g}, allowed {allowed[wrong[0]]:.3g}"


def noise_of(rows: int, generator: torch.Generator) -> torch.Tensor:
    """seeds, steps"""
    return torch.randint(0, 2**32, (2, rows), device=generator.device, generator=generator)


def columns_of(case: str, rows: int, device: torch.device) -> tuple[torch.Tensor | None, ...]:
    """temperature, top_k, top_p, min_p as the operators take them."""
    given = FILTERS[case]
    temperature = torch.full((rows,), given.get("temperature", 1.0), device=device)
    if not {"top_k", "top_p", "min_p"} & given.keys():
        return temperature, None, None, None
    top_k = torch.full((rows,), given.get("top_k", 0), device=device)
    top_p, min_p = (torch.full((rows,), given.get(*x), device=device) for x in (("top_p", 1.0), ("min_p", 0.0)))
    return temperature, top_k, top_p, min_p


def logits_inputs(rows: int, vocab: int, dtype: torch.dtype, case: str, generator: torch.Generator) -> Inputs:
    """logits, seeds, steps, bits of the allowed ids or None, temperature, top_k, top_p, min_p"""
    device = generator.device
    logits = (torch.randn(rows, vocab, device=device, generator=generator) * SPREAD).to(dtype)
    allowed = masks.of_ids(set(range(vocab)) - {*BANNED}, vocab)[None].to(device) if case == "banned" else None
    return logits, *noise_of(rows, generator), allowed, *columns_of(case, rows, device)


def from_logits(backend: str, case: str, logits, seeds, steps, allowed, *columns) -> Results:
    if backend == "cuda":
        ids, values = operators.sample(logits, seeds, steps, *columns, allowed, backend)
        return ids, *values.unbind()
    given = {"temperature": 1.0, **FILTERS[case], "allowed": None if allowed is None else allowed[0]}
    return sampling.sample(logits, **given, seeds=seeds, steps=steps, backend=backend)


def without_banned(case: str, logits: torch.Tensor) -> torch.Tensor:
    """-inf for the ids that the case bans, in a copy; a list of ids as an index would make a GPU wait for the host."""
    if case == "banned":
        logits = logits.clone()
        for token in BANNED:
            logits[:, token] = -math.inf
    return logits


def torch_draw(case: str, logits: torch.Tensor, *_: Any) -> torch.Tensor:
    """Top-k, then top-p of the rest, then min-p, then multinomial; ties at a border go by the sort."""
    given = FILTERS[case]
    if given.get("temperature") == 0.0:
        return logits.argmax(-1)
    logits = without_banned(case, logits).float() / given.get("temperature", 1.0)
    ids = None
    if "top_k" in given:
        logits, ids = logits.topk(min(given["top_k"], logits.shape[1]), -1)
    elif "top_p" in given:
        logits, ids = logits.sort(-1, descending=True)
    p = torch.softmax(logits, -1)
    if "top_p" in given:
        p = torch.where(p.cumsum(-1) - p < given["top_p"], p, 0.0)
    if "min_p" in given:
        p = torch.where(p >= given["min_p"] * p.amax(-1, keepdim=True), p, 0.0)
    drawn = torch.multinomial(p, 1)
    return drawn if ids is None else ids.gather(-1, drawn)


def flashinfer_draw(case: str, logits: torch.Tensor, *_: Any) -> torch.Tensor:
    import flashinfer

    given, draw = FILTERS[case], flashinfer.sampling
    logits = without_banned(case, logits).float()
    if case in ("plain", "banned"):
        return draw.sampling_from_logits(logits)
    if case == "top_k_top_p":
        return draw.top_k_top_p_sampling_from_logits(logits, given["top_k"], given["top_p"])
    p = draw.softmax(logits, temperature=given.get("temperature", 1.0))
    by_name = {"top_k": draw.top_k_sampling_from_probs, "top_p": draw.top_p_sampling_from_probs}
    by_name["min_p"] = draw.min_p_sampling_from_probs
    return by_name[case](p, given[case]) if case in by_name else draw.sampling_from_probs(p)


def logits_peers(case: str, device: torch.device) -> dict[str, Run]:
    found: dict[str, Run] = {"torch": partial(torch_draw, case)}
    if device.type == "cuda":
        torch._dynamo.reset()  # one code object is compiled for a limited number of shapes
        found["compile"] = torch.compile(partial(torch_draw, case), dynamic=False)
        if find_spec("flashinfer") and case != "greedy":
            found["flashinfer"] = partial(flashinfer_draw, case)
    return found


def check_logits(case: str, inputs: Inputs, results: Results, room: float) -> None:
    check_draw(inputs[0].double(), inputs[0].float(), results, case, room)
    if case == "banned":
        assert not bool(torch.isin(results[0], torch.tensor(BANNED, device=results[0].device)).any()), "a banned token"


def hidden_inputs(rows: int, dim: int, vocab: int, dtype: torch.dtype, case: str, generator: torch.Generator) -> Inputs:
    """hidden, lm_head, seeds, steps, temperature, top_k, top_p, min_p"""
    draw = partial(torch.randn, device=generator.device, generator=generator)
    head = (draw(vocab, dim) * SPREAD * dim**-0.5).to(dtype)
    return draw(rows, dim).to(dtype), head, *noise_of(rows, generator), *columns_of(case, rows, generator.device)


def from_hidden(backend: str, case: str, hidden, lm_head, seeds, steps, *columns) -> Results:
    if not hidden.is_cuda or backend == "reference":
        given = {"temperature": 1.0, **FILTERS[case], "seeds": seeds, "steps": steps}
        return sampling.sample_from_hidden(hidden, lm_head, **given, backend=backend)
    fused = backend == "triton" or (backend == "cuda" and sampling._fits_hopper(hidden, lm_head))
    if case == "plain" and fused:
        drawn = operators.sample_from_hidden(hidden, lm_head, None, columns[0], seeds, steps, None, False, backend)
    else:
        drawn = operators.sample(sampling.logits_of(hidden, lm_head), seeds, steps, *columns, None, "cuda")
    return drawn[0], *drawn[1].unbind()


def linear(hidden: torch.Tensor, lm_head: torch.Tensor, *_: Any) -> torch.Tensor:
    return F.linear(hidden, lm_head)


def gumbel(hidden: torch.Tensor, lm_head: torch.Tensor, *_: Any) -> torch.Tensor:
    """argmax(logits + Gumbel noise): the noise is minus the logarithm of an exponential variate."""
    logits = F.linear(hidden, lm_head).float()
    return (logits - torch.empty_like(logits).exponential_().log_()).argmax(-1)


def slabs(hidden: torch.Tensor, lm_head: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-k, then top-p, in two passes -> ids, log-probs over the whole vocabulary.

    The k largest of each slab hold the k largest of all; a running log-sum-exp gives the log-probs.
    """
    given = FILTERS["top_k_top_p"]
    values, ids, lse = [], [], []
    for start in range(0, len(lm_head), SLAB):
        logits = F.linear(hidden, lm_head[start : start + SLAB]).float()
        best = logits.topk(min(given["top_k"], logits.shape[1]), -1)
        values.append(best.values)
        ids.append(best.indices + start)
        lse.append(logits.logsumexp(-1))
    best = torch.cat(values, -1).topk(min(given["top_k"], len(lm_head)), -1)
    p = torch.softmax(best.values, -1)
    drawn = torch.multinomial(torch.where(p.cumsum(-1) - p < given["top_p"], p, 0.0), 1)
    tokens = torch.cat(ids, -1).gather(-1, best.indices.gather(-1, drawn))
    return tokens, best.values.gather(-1, drawn) - torch.stack(lse).logsumexp(0)[:, None]


def hidden_peers(case: str, device: torch.device) -> dict[str, Run]:
    found: dict[str, Run] = {"linear": linear, **({"gumbel": gumbel} if case == "plain" else {"slabs": slabs})}
    if device.type == "cuda":
        torch._dynamo.reset()
        if case == "plain":
            found["gumbel_compile"] = torch.compile(gumbel, dynamic=False)
        if find_spec("flashinfer"):
            found["flashinfer"] = lambda hidden, lm_head, *_: flashinfer_draw(case, F.linear(hidden, lm_head))
    return found


def check_hidden(case: str, inputs: Inputs, results: Results, room: float) -> None:
    hidden, lm_head = inputs[:2]
    exact, plain = F.linear(hidden.double(), lm_head.double()), F.linear(hidden.float(), lm_head.float())
    check_draw(exact, plain, results, case, room)


def measurements(options: Options) -> Iterator[Measurement]:
    yield from _from_hidden(options)  # compiles few peers: a run that is cut short has rows of both
    yield from _from_logits(options)


def _from_logits(options: Options) -> Iterator[Measurement]:
    on_gpu = options.device.type == "cuda"
    backends = [name for name in backends_of("sampling", options.device) if name != "triton"]
    shapes = [(8, 49_152), (8, 151_936), (64, 151_936), (128, 62)] + ([(256, 151_936)] if on_gpu else [])
    for dtype in (torch.float32, torch.bfloat16) if on_gpu else (torch.float32,):
        for rows, vocab in [(4, 62)] if options.quick else shapes:
            for case in FILTERS:
                yield Measurement(
                    kernel="sample",
                    shape={"N": rows, "V": vocab, "case": case},
                    dtype=dtype,
                    make_inputs=partial(logits_inputs, rows, vocab, dtype, case),
                    backends={name: partial(from_logits, name, case) for name in backends},
                    check=partial(check_logits, case),
                    floor=floors.sample(rows, vocab, dtype.itemsize),
                    peers=logits_peers(case, options.device),
                    check_peers=False,
                )


def _from_hidden(options: Options) -> Iterator[Measurement]:
    on_gpu = options.device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    heads = [(1, 2048, 151_936), (64, 2048, 151_936), (256, 2048, 151_936)] if on_gpu else [(8, 576, 49_152)]
    for rows, dim, vocab in [(4, 32, 64)] if options.quick else heads:
        for case in FROM_HIDDEN:
            names = [name for name in backends_of("sampling", options.device) if case == "plain" or name in UNFUSED]
            names += ["product"] if on_gpu else []
            yield Measurement(
                kernel="sample_from_hidden",
                shape={"N": rows, "D": dim, "V": vocab, "case": case},
                dtype=dtype,
                make_inputs=partial(hidden_inputs, rows, dim, vocab, dtype, case),
                backends={name: partial(from_hidden, name, case) for name in names},
                check=partial(check_hidden, case),
                floor=floors.sample_from_hidden(rows, dim, vocab, dtype.itemsize),
                peers=hidden_peers(case, options.device),
                check_peers=False,
            )


if __name__ == "__main__":
    raise SystemExit(main(__doc__, KERNELS, measurements))
