"""Sampling in plain torch: the definition of correct, and the backend where nothing is compiled.

Gumbel-max as an exponential race. Token i of the kept set scores z_i + g_i, g_i = -log(e_i), where e_i = -log(u_i)
is an exponential variate made of its noise word. With r_i = 1 - u_i, which costs no logarithm,

    r_i <= e_i <= 22.9 r_i        (-log(1 - r) / r rises from 1 to 33 log 2 / (1 - 2^-33) at the largest r)

and argmax(z_i + g_i) = argmax(p_i / e_i) for p_i = exp(z_i - z_max). So the winner's p_i / r_i is at least the
largest p_j / r_j over 22.9: about two dozen candidates a row, whatever the vocabulary, are the only tokens whose
exact score is computed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from foveate.kernels.sampling import masks, philox

# log_kept of a set that lost ids, but none whose probability shows in fp32: minus the smallest normal number.
LOST_NOTHING_VISIBLE = -torch.finfo(torch.float32).tiny

_ROW_BLOCK_ELEMENTS = 1 << 20  # logits worked on at a time: bounds memory, keeps temporaries in cache
_SUM_SLAB = 4096  # sums run in slabs of this many ids, so that a row sums alike alone and in a batch
_FIRST_SORT = 1024  # top-p looks at this many largest ids before it sorts a whole row
_TOP_P_BITS = 24
_WEIGHT_BITS = 40
_DIRECT_VOCAB = 512  # rows of at most this many ids compute every score
_SLAB = 64  # the race looks for candidates in slabs of this many ids
_RACE_RATIO = 24.0  # the 22.9 above and what fp32 rounding of p / r can add


class Parameters(NamedTuple):
    """Per-row parameters, checked: temperature, top_p, min_p float32 [N]; top_k int64 [N].

    allowed: int32 [1, W] or [N, W] or None, bits of the ids that may be drawn (`masks.pack`). filtered: whether any row
    uses a filter. banned: bool [V] or [N, V], the other ids, where `rows` has unpacked them.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    allowed: torch.Tensor | None
    filtered: bool
    banned: torch.Tensor | None = None

    def rows(self, index: slice, vocab: int) -> Parameters:
        allowed = banned = None
        if self.allowed is not None:
            allowed = self.allowed if len(self.allowed) == 1 else self.allowed[index]
            banned = ~masks.unpack(allowed, vocab)
            banned = banned[0] if len(self.allowed) == 1 else banned
        temperature, top_k, top_p, min_p = (v[index] for v in (self.temperature, self.top_k, self.top_p, self.min_p))
        return Parameters(temperature, top_k, top_p, min_p, allowed, self.filtered, banned)


class Distribution(NamedTuple):
    """One block of rows: softmax(scaled) and the set that remains of it.

    scaled: float32 [N, V], logits / T. peak, log_total: float32 [N, 1], so that log-softmax is
    scaled - peak - log_total. weights: float32 [N, V], proportional to the probabilities of the kept set, 0
    outside it. bounds: float32 [N, W], W = V rounded up to whole slabs, room for the race's p / r. entropy, log_kept:
    float32 [N]. valid: bool [N], False where nothing can be drawn.
    """

    scaled: torch.Tensor
    peak: torch.Tensor
    log_total: torch.Tensor
    weights: torch.Tensor
    bounds: torch.Tensor
    entropy: torch.Tensor
    log_kept: torch.Tensor
    valid: torch.Tensor


@torch.no_grad()
def sample(
    logits: torch.Tensor, parameters: Parameters, seeds: torch.Tensor, steps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids int64 [N] and their logprobs, log_kept, entropy float32 [N]; the contract is `sampling.sample`."""
    blocks = []
    for rows in _row_blocks(logits):
        p = parameters.rows(rows, logits.shape[1])
        dist = _distribution(logits[rows], p)
        ids = _draw(dist, p, seeds[rows], steps[rows])
        blocks.append((ids, *_values(dist, ids)))
    ids, logprobs, log_kept, entropy = (torch.cat(column) for column in zip(*blocks, strict=True))
    return ids, logprobs, log_kept, entropy


@torch.no_grad()
def score(
    logits: torch.Tensor, token_ids: torch.Tensor, parameters: Parameters
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logprobs, log_kept, entropy float32 [N] of given tokens, by the code that samples them."""
    blocks = [
        _values(_distribution(logits[rows], parameters.rows(rows, logits.shape[1])), token_ids[rows])
        for rows in _row_blocks(logits)
    ]
    logprobs, log_kept, entropy = (torch.cat(column) for column in zip(*blocks, strict=True))
    return logprobs, log_kept, entropy


def gumbel(words: torch.Tensor) -> torch.Tensor:
    """Gumbel noise float32 of noise words (int64 in [0, 2^32)), finite for each: -3.14 to 22.88.

    m = ~x. m < 2^31: e = -log1p(-(m + 0.5) 2^-32), else e = -log((x + 0.5) 2^-32); g = -log(e). The two forms keep
    full precision at both ends, where -log(-log(u)) of a rounded u would be infinite.
    """
    complements = (words ^ philox.MASK).to(torch.float32).add_(0.5).mul_(2.0**-32)
    uniforms = words.to(torch.float32).add_(0.5).mul_(2.0**-32)
    exponentials = torch.where(words >= 2**31, -torch.log1p(-complements), -torch.log(uniforms))
    return -torch.log(exponentials)


def _row_blocks(logits: torch.Tensor) -> list[slice]:
    size = max(1, _ROW_BLOCK_ELEMENTS // logits.shape[1])
    return [slice(row, row + size) for row in range(0, max(1, logits.shape[0]), size)]


def _distribution(logits: torch.Tensor, p: Parameters) -> Distribution:
    divisor = torch.where(p.temperature == 0, 1.0, p.temperature)[:, None]
    scaled = logits.to(torch.float32)
    if bool((divisor != 1).any()):
        scaled = scaled / divisor
    peak = scaled.amax(-1, keepdim=True)
    centred, weights, bounds = _buffers(scaled)
    torch.sub(scaled, peak, out=centred)
    torch.exp(centred, out=weights)
    total = _sum(weights)
    log_total = total.log()
    # A weight is 0 long before -200, and 0 * -inf would be NaN.
    entropy = log_total - _sum(centred.clamp_(min=-200.0).mul_(weights)) / total
    log_kept = torch.zeros_like(peak)
    valid = peak.isfinite()
    cut = _cut(scaled, p)
    if cut is not None:
        log_kept, kept_any = _remove(weights, cut, scaled, peak, total)
        valid &= kept_any
    return Distribution(scaled, peak, log_total, weights, bounds, entropy[:, 0], log_kept[:, 0], valid[:, 0])


def _buffers(scaled: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Uninitialised float32 [N, V], [N, V], [N, V rounded up to whole slabs], in one allocation.

    One, because the C library keeps twice the largest block it was given back: with the buffers apart, a loop of
    calls returns them to the system every time, and page faults cost more than the arithmetic.
    """
    rows, vocab = scaled.shape
    widths = (vocab, vocab, -(-vocab // _SLAB) * _SLAB)
    flat = torch.empty(rows * sum(widths), device=scaled.device)
    parts = flat.split([rows * width for width in widths])
    return tuple(part.view(rows, width) for part, width in zip(parts, widths, strict=True))


def _remove(
    weights: torch.Tensor, cut: torch.Tensor, scaled: torch.Tensor, peak: torch.Tensor, total: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Takes the cut ids (bool [V] or [N, V]) out of weights, in place; returns log_kept and whether any id is left.

    The smaller of the two masses is summed, so that neither a tiny cut nor a tiny remainder is lost.
    """
    lost = weights * cut.to(torch.float32)
    weights.sub_(lost)
    share = _sum(lost) / total
    log_kept = torch.log1p(-share)
    kept_any = torch.ones_like(peak, dtype=torch.bool)
    unseen = (share[:, 0] < 2.0**-126).nonzero()[:, 0]
    if len(unseen):
        removed = (_rows(cut, unseen) & (scaled[unseen] > -torch.inf)).any(-1, keepdim=True)
        log_kept[unseen] = torch.where(removed, LOST_NOTHING_VISIBLE, 0.0)
    mostly_lost = (share[:, 0] > 0.5).nonzero()[:, 0]
    if len(mostly_lost):
        left = scaled[mostly_lost].masked_fill_(_rows(cut, mostly_lost), -torch.inf)
        left_peak = left.amax(-1, keepdim=True)
        left.sub_(left_peak).exp_()
        weights[mostly_lost] = left
        kept_any[mostly_lost] = left_peak > -torch.inf
        difference = left_peak - peak[mostly_lost]
        log_kept[mostly_lost] = difference + (_sum(left).log() - total[mostly_lost].log())
    return log_kept, kept_any


def _rows(cut: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return cut if cut.dim() == 1 else cut[rows]


def _cut(scaled: torch.Tensor, p: Parameters) -> torch.Tensor | None:
    """What is never drawn: bool [V] or [N, V], or None. Ids whose scaled logit is -inf may be in it or not."""
    if not p.filtered:
        return p.banned
    uses = (p.top_k > 0) | (p.top_p < 1) | (p.min_p > 0)
    rows = (uses & (p.temperature > 0)).nonzero()[:, 0]
    allowed = scaled[rows]
    if p.banned is not None:
        allowed.masked_fill_(_rows(p.banned, rows), -torch.inf)
    cut = torch.zeros_like(scaled, dtype=torch.bool)
    if p.banned is not None:
        cut |= p.banned
    cut[rows] |= _filtered_out(allowed, p.top_k[rows], p.top_p[rows], p.min_p[rows])
    return cut


def _filtered_out(allowed: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """bool [R, V]: what top-k, then top-p, then min-p cut from allowed (float32 [R, V], -inf = banned).

    Top-k and top-p both keep the n first in (z descending, id ascending) order: all above the n-th largest value,
    and as many of the ids that equal it, from the lowest on, as n has room for.
    """
    num_kept, edge = _num_kept(allowed, top_k, top_p)
    out = allowed < edge
    surplus = ((~out).sum(-1) > num_kept).nonzero()[:, 0]
    if len(surplus):
        values, edges = allowed[surplus], edge[surplus]
        equal = values == edges
        room = num_kept[surplus, None] - (values > edges).sum(-1, keepdim=True)
        out[surplus] |= equal & (equal.cumsum(-1) > room)
    # The log is taken in double, so that its fp32 rounding is the same everywhere.
    floor = allowed.amax(-1, keepdim=True) + min_p.double().log().to(torch.float32)[:, None]
    return out.logical_or_(allowed < floor)


def _num_kept(allowed: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many ids top-k and then top-p keep (int64 [R]), and the value of the last of them (float32 [R, 1])."""
    vocab = allowed.shape[1]
    num_kept = torch.where(top_k > 0, top_k.clamp(max=vocab), vocab)
    edge = torch.full_like(allowed[:, :1], -torch.inf)
    open_rows = ((top_k > 0) | (top_p < 1)).nonzero()[:, 0]
    limit = num_kept.clone()
    for width in (min(_FIRST_SORT, vocab), vocab):
        if len(open_rows) == 0:
            break
        values, limits = allowed[open_rows], limit[open_rows]
        largest = values.topk(min(width, int(limits.max())), dim=-1).values
        count, reached = _top_p_count(values, largest, limits, top_p[open_rows])
        num_kept[open_rows] = count
        edge[open_rows] = largest.gather(1, count.clamp(max=largest.shape[1])[:, None] - 1)
        open_rows = open_rows[~reached]
    return num_kept, edge


def _top_p_count(
    values: torch.Tensor, largest: torch.Tensor, limits: torch.Tensor, top_p: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The length of the shortest prefix that holds top_p of the mass, and whether `largest` was long enough to tell.

    w = floor(exp(z - z_max) 2^40); the prefix needs sum(w) 2^24 >= floor(p 2^24) total, total over the `limits`
    first values (top-k comes before). With total = hi 2^24 + lo that is sum(w) >= P hi + ceil(P lo / 2^24), which
    stays below 2^63 for every vocabulary under 2^22.
    """
    width, vocab = largest.shape[1], values.shape[1]
    peak = largest[:, :1]
    position = torch.arange(1, width + 1, device=values.device)
    sums = _integer_weights(largest, peak).masked_fill_(position > limits[:, None], 0).cumsum(-1)
    total = sums[:, -1:].clone()
    whole = (limits >= vocab).nonzero()[:, 0] if width < vocab else limits[:0]
    if len(whole):
        total[whole] = _integer_weights(values[whole], peak[whole]).sum(-1, keepdim=True)
    share = (top_p.double() * 2**_TOP_P_BITS).floor().to(torch.int64)[:, None]
    low = total & (2**_TOP_P_BITS - 1)
    needed = share * (total >> _TOP_P_BITS) + ((share * low + 2**_TOP_P_BITS - 1) >> _TOP_P_BITS)
    count = (sums < needed).sum(-1) + 1
    count = torch.where(top_p < 1, count, limits)
    # A total is known where top-k is off, or looks no further than `largest`.
    reached = (limits <= width) | ((limits >= vocab) & (count <= width))
    return torch.minimum(count, limits), reached


def _integer_weights(values: torch.Tensor, peak: torch.Tensor) -> torch.Tensor:
    return (values - peak).double().exp_().mul_(2.0**_WEIGHT_BITS).to(torch.int64)


def _draw(dist: Distribution, p: Parameters, seeds: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """int64 [N]: the drawn ids, -1 where nothing can be drawn."""
    ids = torch.full_like(seeds, -1)
    vocab = dist.scaled.shape[1]
    greedy = (dist.valid & (p.temperature == 0)).nonzero()[:, 0]
    if len(greedy):
        allowed = dist.scaled[greedy]
        if p.banned is not None:
            allowed.masked_fill_(_rows(p.banned, greedy), -torch.inf)
        ids[greedy] = allowed.argmax(-1)
    drawn = (dist.valid & (p.temperature > 0)).nonzero()[:, 0]
    if len(drawn) == len(ids):
        return _gumbel_max(dist.scaled, dist.weights, dist.bounds, philox.noise_words(seeds, steps, vocab))
    if len(drawn):
        words = philox.noise_words(seeds[drawn], steps[drawn], vocab)
        ids[drawn] = _gumbel_max(dist.scaled[drawn], dist.weights[drawn], dist.bounds[: len(drawn)], words)
    return ids


def _gumbel_max(scaled: torch.Tensor, weights: torch.Tensor, bounds: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """argmax of scaled + noise over the ids of positive weight, lowest id on ties: int64 [N]. Overwrites bounds.

    A kept id whose weight is 0 in fp32 lies 87 below the largest; the noise of two ids differs by 26 at most.
    """
    vocab = scaled.shape[1]
    if vocab > _DIRECT_VOCAB:
        return _race(scaled, weights, bounds, words)
    scores = scaled + gumbel(words[:, :vocab].long() & philox.MASK)
    return scores.masked_fill_(weights == 0, -torch.inf).argmax(-1)


def _race(scaled: torch.Tensor, weights: torch.Tensor, bounds: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """`_gumbel_max` by the race above: exact scores for the few ids that can win."""
    vocab = scaled.shape[1]
    r = bounds[:, :vocab].copy_(words[:, :vocab]).add_(0.5).mul_(-(2.0**-32))
    r.sub_(r.floor())  # words are signed, so that this is r modulo 1
    torch.div(weights, r, out=r)
    bounds[:, vocab:] = 0
    slabs = bounds.unflatten(1, (-1, _SLAB))
    slab_max = slabs.amax(-1)
    # Scores are rounded at their own magnitude, which can exceed that of the noise by far.
    slack = (scaled.amax(-1, keepdim=True).abs() + 64.0) * 2.0**-21
    bar = slab_max.amax(-1, keepdim=True) * torch.exp(-slack) / _RACE_RATIO
    bar.clamp_(min=torch.finfo(torch.float32).tiny)  # a weight of 0 is no candidate
    rows, columns = (slab_max >= bar).nonzero(as_tuple=True)
    found, lane = (slabs[rows, columns] >= bar[rows]).nonzero(as_tuple=True)
    rows, ids = rows[found], columns[found] * _SLAB + lane
    scores = scaled[rows, ids] + gumbel(words[rows, ids].long() & philox.MASK)
    best = torch.full_like(scaled[:, 0], -torch.inf).scatter_reduce(0, rows, scores, "amax")
    winners = scores == best[rows]
    return torch.full_like(words[:, 0], vocab, dtype=torch.int64).scatter_reduce(0, rows[winners], ids[winners], "amin")


def _values(dist: Distribution, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    chosen = dist.scaled.gather(1, ids.clamp(min=0)[:, None])
    logprobs = ((chosen - dist.peak) - dist.log_total)[:, 0]
    nan = torch.nan
    logprobs, log_kept, entropy = (
        torch.where(dist.valid, value, nan) for value in (logprobs, dist.log_kept, dist.entropy)
    )
    return logprobs, log_kept, entropy


def _sum(values: torch.Tensor) -> torch.Tensor:
    """Row sums [N, 1] whose order depends on the width alone."""
    width = values.shape[1]
    whole = width // _SUM_SLAB * _SUM_SLAB
    slabs = values[:, :whole].unflatten(1, (width // _SUM_SLAB, _SUM_SLAB)).sum(-1)
    return torch.cat([slabs, values[:, whole:].sum(-1, keepdim=True)], -1).sum(-1, keepdim=True)
