"""Drawing tokens: `sample`, `sample_from_hidden`, and `score` of given tokens by the same code.

With z = logits / T in fp32, a row's token is argmax(z_i + g_i) over the ids that remain after, in this order: bans,
top-k (exactly k), top-p (the shortest prefix in (z descending, id ascending) order whose mass reaches p), min-p
(z_i >= z_max + log(min_p), z_max over the ids not banned). Ties go to the lowest id everywhere. T = 0 is argmax over
the ids not banned, without noise and other filters.

Top-p counts integers, so that no summation order matters: w_i = floor(exp(z_i - z_max) 2^40), exp in double of the
fp32 difference; kept is the shortest prefix, of at least one id, with sum(w) 2^24 >= floor(p 2^24) total(w).

Noise (Gumbel-max; the words are those of Philox4x32-10, Salmon et al., SC'11):

    x = lane (id mod 4) of Philox(counter = (id // 4, step, 0, 0), key = seed),  m = 2^32 - 1 - x
    e = -log1p(-(m + 0.5) 2^-32) if m < 2^31 else -log((x + 0.5) 2^-32),  g = -log(e),  in fp32

It depends on seed, step and id alone: never on the row, the batch, a tile or a device. The global generators of
torch are not touched.

>>> from foveate.kernels.sampling import philox, reference
>>> words = philox.noise_words(torch.tensor([0x0123456789ABCDEF]), torch.tensor([2]), 5)[0, :5].long() & 0xFFFFFFFF
>>> [f"{word:08x}" for word in words.tolist()]
['c130fa24', '8ba69810', 'b4df5927', 'a5294e6e', '9aa81b3e']
>>> [f"{noise:.4f}" for noise in reference.gumbel(words).tolist()]
['1.2676', '0.5008', '1.0573', '0.8250', '0.6852']

Every row is on its own: its results are the same bits alone and in any batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from foveate import _C
from foveate.kernels.dispatch import KERNEL_DTYPES, choose, choose_among, for_family, is_named, require
from foveate.kernels.layers import linear
from foveate.kernels.sampling import masks, operators, reference
from foveate.kernels.sampling.philox import request_seed, sample_seed

__all__ = ["SampleOutput", "logits_of", "request_seed", "sample", "sample_from_hidden", "sample_seed", "score"]

MIN_TEMPERATURE = 1e-4
RowValue = float | int | torch.Tensor


class SampleOutput(NamedTuple):
    """What was drawn, one entry a row.

    token_ids: int64 [N], -1 for a row that cannot be sampled (NaN or +inf in it, or nothing allowed), whose other
    values are NaN. logprobs: float32 [N], log-softmax(z) of the token over the whole vocabulary. log_kept: float32
    [N], log mass under the same softmax of the set it was drawn from; 0 if and only if no id of non-zero probability
    (z above -inf) was removed. entropy: float32 [N], of softmax(z), in nats. T = 0 reports these at T = 1. The
    behaviour log-probability is `logprobs - log_kept`.
    """

    token_ids: torch.Tensor
    logprobs: torch.Tensor
    log_kept: torch.Tensor
    entropy: torch.Tensor


def sample(
    logits: torch.Tensor,
    *,
    temperature: RowValue,
    top_k: RowValue | None = None,
    top_p: RowValue | None = None,
    min_p: RowValue | None = None,
    seeds: torch.Tensor,
    steps: torch.Tensor,
    banned: torch.Tensor | None = None,
    allowed: torch.Tensor | None = None,
    backend: str | None = None,
) -> SampleOutput:
    """Draws one token a row; the rules stand in the module's docstring.

    logits: float [N, V], -inf allowed. temperature, top_p, min_p: float32 [N] or a number, rounded to fp32; top_k:
    int [N] or an int. temperature 0 (greedy) or at least 1e-4; top_k >= 0, 0 is off; 0 < top_p <= 1, 1 is off;
    0 <= min_p <= 1, 0 is off; None is off. seeds: int64 [N], the two's complement of the unsigned sample seed.
    steps: int64 [N] in [0, 2^32), tokens of the sample already drawn. banned: bool [V] or [N, V], True = never
    drawn. allowed: int32 [ceil(V / 32)] or [N, ceil(V / 32)], bits of the ids that may be drawn (`masks.pack`); an id
    must be allowed and not banned. backend: None chooses; "triton" has no kernel for it
    (`foveate.kernels.dispatch.choose_among`). Raises ValueError on shapes, dtypes and values out of range.

    Values are checked where they lie: numbers and tensors on the CPU cost a GPU no wait, tensors on a GPU do.
    """
    logits = _readable(logits)
    chosen = _drawing("sample", backend, logits.device)
    parameters = _parameters(logits, temperature, top_k, top_p, min_p, banned, allowed)
    seeds, steps = _noise(seeds, steps, logits)
    if chosen == "reference":
        return SampleOutput(*reference.sample(logits, parameters, seeds, steps))
    ids, values = operators.sample(_rows(logits), seeds, steps, *_tensors(parameters), chosen)
    return SampleOutput(ids, *values.unbind())


def sample_from_hidden(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: RowValue,
    top_k: RowValue | None = None,
    top_p: RowValue | None = None,
    min_p: RowValue | None = None,
    seeds: torch.Tensor,
    steps: torch.Tensor,
    banned: torch.Tensor | None = None,
    allowed: torch.Tensor | None = None,
    backend: str | None = None,
) -> SampleOutput:
    """`sample` of the logits hidden @ lm_head^T + bias, accumulated in fp32 and never rounded to less.

    hidden: float [N, D]. lm_head: float [V, D]. bias: float [V] or None. The other arguments, the result and the
    errors are those of `sample`. backend: "triton" is one kernel that multiplies and draws and never writes logits,
    where no row asks for top-k, top-p or min-p; its bits depend on the row alone. So is "cuda", where it is asked for
    by its name, on a GPU of compute capability 9.0, for matrices of one 16-bit type with V a multiple of 4 and rows
    that begin at multiples of 16 bytes. Everywhere else the logits are a matrix product, whose rounding may depend on
    N, and go to `sample`.
    """
    for matrix, argument in ((hidden, "hidden"), (lm_head, "lm_head")):
        require(matrix.dim() == 2 and matrix.is_floating_point(), "a float matrix", _kind(matrix), argument)
    require(hidden.shape[1] == lm_head.shape[1], f"[N, {lm_head.shape[1]}]", _kind(hidden), "hidden")
    if bias is not None:
        require(bias.shape == lm_head.shape[:1], f"float [{lm_head.shape[0]}]", _kind(bias), "bias")
    chosen = choose("sampling", backend, hidden.device, hidden.dtype)
    is_asked_for = chosen == "cuda" and is_named("sampling", backend)
    if chosen == "triton" or (is_asked_for and _fits_hopper(hidden, lm_head)):
        frame = torch.empty((), device=hidden.device).expand(len(hidden), len(lm_head))
        parameters = _parameters(frame, temperature, top_k, top_p, min_p, banned, allowed)
        if not parameters.filtered:
            seeds, steps = _noise(seeds, steps, frame)
            tempered = not isinstance(temperature, (int, float)) or temperature not in (0, 1)
            return _fused(hidden, lm_head, bias, parameters, seeds, steps, tempered, chosen)
    return sample(
        logits_of(hidden, lm_head, bias),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seeds=seeds,
        steps=steps,
        banned=banned,
        allowed=allowed,
        backend=for_family("sampling", chosen),
    )


def logits_of(hidden: torch.Tensor, lm_head: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """float32 [N, V]: hidden @ lm_head^T + bias, accumulated in fp32 and never rounded to less.

    hidden: float [N, D]. lm_head: float [V, D]. bias: float [V] or None. On a GPU a product of two matrices of the same
    16-bit type reads them as they are.
    """
    if hidden.is_cuda and hidden.dtype == lm_head.dtype and hidden.dtype in (torch.float16, torch.bfloat16):
        logits = torch.mm(hidden.detach(), lm_head.detach().t(), out_dtype=torch.float32)
        return logits if bias is None else logits.add_(bias.detach())
    return linear(hidden.float(), lm_head.float(), None if bias is None else bias.float())


def score(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    temperature: RowValue,
    top_k: RowValue | None = None,
    top_p: RowValue | None = None,
    min_p: RowValue | None = None,
    banned: torch.Tensor | None = None,
    allowed: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logprobs, log_kept and entropy (float32 [N] each) of given tokens: bitwise those `sample` returns with them.

    token_ids: int64 [N] in [0, V). A token outside the kept set still has its log-probability over the whole
    vocabulary. The other arguments and the errors are those of `sample`; rows that cannot be sampled give NaN.
    """
    logits = _readable(logits)
    chosen = _drawing("score", backend, logits.device)
    parameters = _parameters(logits, temperature, top_k, top_p, min_p, banned, allowed)
    _check_rows(token_ids, logits, "token_ids")
    if token_ids.numel():
        low, high = (int(x) for x in token_ids.aminmax())
        require(low >= 0 and high < logits.shape[1], f"ids in [0, {logits.shape[1]})", (low, high), "token_ids")
    if chosen == "reference":
        return reference.score(logits, token_ids, parameters)
    return operators.score(_rows(logits), token_ids, *_tensors(parameters), chosen).unbind()


def _drawing(operation: str, backend: str | None, device: torch.device) -> str:
    """Which backend draws where the logits exist; Triton has no kernel for that."""
    return choose_among(("cuda", "cpp", "reference"), operation, "sampling", backend, device)


def _fused(hidden, lm_head, bias, p: reference.Parameters, seeds, steps, tempered: bool, backend: str) -> SampleOutput:
    require(lm_head.dtype == hidden.dtype, f"{hidden.dtype} as hidden", _kind(lm_head), "lm_head")
    given = (_rows(hidden), _rows(lm_head), bias, p.temperature, seeds, steps, p.allowed)
    ids, values = operators.sample_from_hidden(*given, tempered, backend)
    return SampleOutput(ids, *values.unbind())


def _fits_hopper(hidden: torch.Tensor, lm_head: torch.Tensor) -> bool:
    """Whether the kernel of csrc/sample_from_hidden.cu takes these matrices where they are."""
    if not hidden.is_cuda or "90a" not in _C.CUDA_ARCHS.split():
        return False
    is_half = hidden.dtype == lm_head.dtype and hidden.dtype in (torch.float16, torch.bfloat16)
    is_aligned = all(
        m.stride(1) == 1 and m.stride(0) % 8 == 0 and m.stride(0) >= m.shape[1] and m.data_ptr() % 16 == 0
        for m in (hidden, lm_head)
    )
    is_chip = torch.cuda.get_device_capability(hidden.device) == (9, 0)
    return is_half and is_aligned and is_chip and len(lm_head) % 4 == 0 and hidden.shape[1] > 0


def _words(frame: torch.Tensor, banned: torch.Tensor | None, allowed: torch.Tensor | None) -> torch.Tensor | None:
    """int32 [1 or N, W]: bits of the ids that are allowed and not banned; None where all are."""
    _check_masks(frame, banned, allowed)
    words = None if banned is None else masks.pack(~banned)
    if allowed is not None:
        words = allowed if words is None else words & allowed
    return None if words is None else words.reshape(-1, words.shape[-1]).contiguous()


def _check_masks(frame: torch.Tensor, banned: torch.Tensor | None, allowed: torch.Tensor | None) -> None:
    """frame: of the logits' shape [N, V]."""
    (num_rows, vocab), words = frame.shape, masks.num_words(frame.shape[1])
    if banned is not None:
        fits = banned.dtype == torch.bool and tuple(banned.shape) in ((vocab,), (num_rows, vocab))
        require(fits, f"bool [{vocab}] or [{num_rows}, {vocab}]", _kind(banned), "banned")
    if allowed is not None:
        fits = allowed.dtype == torch.int32 and tuple(allowed.shape) in ((words,), (num_rows, words))
        require(fits, f"int32 [{words}] or [{num_rows}, {words}]", _kind(allowed), "allowed")


def _noise(seeds: torch.Tensor, steps: torch.Tensor, frame: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Checked, and on the logits' device."""
    _check_rows(seeds, frame, "seeds")
    _check_rows(steps, frame, "steps")
    if steps.numel():
        low, high = (int(x) for x in steps.aminmax())
        require(low >= 0 and high < 2**32, "0 <= steps < 2^32", (low, high), "steps")
    return seeds.to(frame.device, non_blocking=True), steps.to(frame.device, non_blocking=True)


def _readable(logits: torch.Tensor) -> torch.Tensor:
    """Types that the kernels do not read, float64 above all, as float32."""
    return logits.float() if logits.is_floating_point() and logits.dtype not in KERNEL_DTYPES else logits


def _rows(logits: torch.Tensor) -> torch.Tensor:
    """The logits with a contiguous last dimension, without a graph."""
    logits = logits.detach()
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def _tensors(p: reference.Parameters) -> tuple[torch.Tensor | None, ...]:
    """temperature, top_k, top_p, min_p (None where no row filters), allowed: as the operators take them."""
    filters = (p.top_k, p.top_p, p.min_p) if p.filtered else (None, None, None)
    return p.temperature, *filters, p.allowed


def _parameters(
    logits: torch.Tensor,
    temperature: RowValue,
    top_k: RowValue | None,
    top_p: RowValue | None,
    min_p: RowValue | None,
    banned: torch.Tensor | None,
    allowed: torch.Tensor | None,
) -> reference.Parameters:
    require(logits.dim() == 2 and logits.is_floating_point(), "float [N, V]", _kind(logits), "logits")
    vocab = logits.shape[1]
    require(1 <= vocab < 2**22, "1 <= V < 2^22", vocab, "logits")
    t = _row_values(temperature, logits, torch.float32, "temperature")
    k = _row_values(0 if top_k is None else top_k, logits, torch.int64, "top_k")
    p = _row_values(1.0 if top_p is None else top_p, logits, torch.float32, "top_p")
    m = _row_values(0.0 if min_p is None else min_p, logits, torch.float32, "min_p")
    if any(values.is_cuda for values in (t, k, p, m)):
        t, k, p, m = (values.to(logits.device) for values in (t, k, p, m))
    # 1e-4 rounds to fp32 as the tensor does.
    smallest = torch.tensor(MIN_TEMPERATURE, dtype=torch.float32, device="cpu").item()
    ok = (t == 0) | ((t >= smallest) & (t < torch.inf))
    require(bool(ok.all()), f"temperature 0 or in [{MIN_TEMPERATURE}, inf)", t[~ok].tolist(), "temperature")
    require(bool((k >= 0).all()), "top_k >= 0", k[k < 0].tolist(), "top_k")
    ok = (p > 0) & (p <= 1)
    require(bool(ok.all()), "0 < top_p <= 1", p[~ok].tolist(), "top_p")
    ok = (m >= 0) & (m <= 1)
    require(bool(ok.all()), "0 <= min_p <= 1", m[~ok].tolist(), "min_p")
    filtered = bool(((t > 0) & ((k > 0) | (p < 1) | (m > 0))).any())
    t, k, p, m = (values.to(logits.device, non_blocking=True) for values in (t, k, p, m))
    return reference.Parameters(t, k, p, m, _words(logits, banned, allowed), filtered)


def _row_values(value: RowValue, logits: torch.Tensor, dtype: torch.dtype, argument: str) -> torch.Tensor:
    num_rows = logits.shape[0]
    if not isinstance(value, torch.Tensor):
        whole = dtype == torch.float32 or isinstance(value, int)
        require(whole, "an int or int [N]", value, argument)
        return torch.full((num_rows,), value, dtype=dtype, device="cpu")
    kind = "float" if dtype == torch.float32 else "int"
    fits = value.shape == (num_rows,) and value.is_floating_point() == (dtype == torch.float32)
    require(fits and value.dtype != torch.bool, f"{kind} [{num_rows}]", _kind(value), argument)
    return value.to(dtype)


def _check_rows(values: torch.Tensor, logits: torch.Tensor, argument: str) -> None:
    num_rows = logits.shape[0]
    fits = values.dtype == torch.int64 and values.shape == (num_rows,)
    require(fits, f"int64 [{num_rows}]", _kind(values), argument)


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
