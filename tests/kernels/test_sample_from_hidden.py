"""The sampler that never writes logits, against the reference on logits that every product gives exactly."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.kernels import sampling
from foveate.kernels.dispatch import available
from foveate.kernels.sampling import masks, triton_kernel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [
    pytest.mark.skipif("triton" not in available("sampling", DEVICE), reason="needs Triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of NaN and inf in the interpreter
]
TILE = 128  # ids of a program
# "cuda" only takes what Hopper's kernel does: most of it has tests of its own, below.
BACKENDS = ("triton",) if DEVICE.type == "cuda" else ("cpp", "triton")
# Sums of about 1,000 terms in another order, and another exp: relative 2^-24 each, logs below 10.
VALUES = {"rtol": 2e-6, "atol": 4e-6}


each_kernel = pytest.mark.parametrize("backend", BACKENDS)


def draw(hidden, lm_head, backend, **given) -> sampling.SampleOutput:
    if backend == "cpp" and not given.keys() & {"top_k", "top_p", "min_p"}:
        return draw_on_host(hidden, lm_head, **given)
    return sampling.sample_from_hidden(hidden, lm_head, backend=backend, **given)


def draw_on_host(hidden, lm_head, *, temperature, seeds, steps, bias=None, banned=None, allowed=None):
    """The kernel for Hopper, with a plain loop for its product."""
    frame = torch.empty(()).expand(len(hidden), len(lm_head))
    parameters = sampling._parameters(frame, temperature, None, None, None, banned, allowed)
    return sampling._fused(hidden, lm_head, bias, parameters, seeds, steps, True, "cpp")


def assert_same(hidden, lm_head, **given) -> sampling.SampleOutput:
    """Tokens equal, values within the rounding of their sums, of every kernel; returns Triton's."""
    theirs = draw(hidden, lm_head, "reference", **given)
    return [assert_equal(draw(hidden, lm_head, backend, **given), theirs) for backend in BACKENDS][-1]


def assert_equal(ours: sampling.SampleOutput, theirs: sampling.SampleOutput) -> sampling.SampleOutput:
    assert ours.token_ids.tolist() == theirs.token_ids.tolist()
    for got, want in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(got, want, equal_nan=True, **VALUES)
    assert torch.equal(ours.log_kept == 0, theirs.log_kept == 0)
    return ours


def exact(rows: int, dim: int, vocab: int, dtype=torch.float32, spread: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Small dyadic numbers, whose products and sums are exact in fp32 in any order; many logits are equal."""
    hidden = torch.randint(-spread, spread + 1, (rows, dim))
    lm_head = torch.randint(-2, 3, (vocab, dim)) / 8
    return hidden.to(DEVICE, dtype), lm_head.to(DEVICE, dtype)


def noise(rows: int) -> dict[str, torch.Tensor]:
    seeds = torch.randint(-(2**62), 2**62, (rows,), device=DEVICE)
    return {"seeds": seeds, "steps": torch.randint(0, 2**32, (rows,), device=DEVICE)}


def mixed_temperatures(rows: int) -> torch.Tensor:
    return torch.tensor([1.0, 0.0, 0.7, 2.0, 1e-4] * rows)[:rows].to(DEVICE)


@pytest.mark.parametrize("vocab", [1, 2, 3, 5, 127, 128, 129, 300, 1000])
@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (5, 7), (33, 64), (65, 96)])
def test_tokens_and_values(vocab, rows, dim):
    hidden, lm_head = exact(rows, dim, vocab)
    assert_same(hidden, lm_head, temperature=mixed_temperatures(rows), **noise(rows))
    assert_same(hidden, lm_head, temperature=1.0, bias=torch.randint(-3, 4, (vocab,), device=DEVICE) / 4, **noise(rows))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tokens_in_16_bits(dtype):
    if dtype == torch.bfloat16 and DEVICE.type == "cpu":
        pytest.skip("the interpreter has no bfloat16")
    hidden, lm_head = exact(9, 72, 260, dtype)
    assert_same(hidden, lm_head, temperature=mixed_temperatures(9), **noise(9))


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
@pytest.mark.parametrize("vocab", [33, 300])
def test_bans_and_allowed_ids(vocab, share):
    rows = 7
    hidden, lm_head = exact(rows, 24, vocab)
    given = {"temperature": mixed_temperatures(rows), **noise(rows)}
    each = torch.rand(rows, vocab, device=DEVICE) < share
    each[:, 0] = True
    every = each[2]
    for banned in (None, ~every, ~each):
        for allowed in (None, masks.pack(every), masks.pack(each)):
            if banned is None and allowed is None:
                continue
            out = assert_same(hidden, lm_head, banned=banned, allowed=allowed, **given)
            assert (out.token_ids >= 0).all()
            for row, token in enumerate(out.token_ids.tolist()):
                assert banned is None or not banned.expand(rows, -1)[row, token]
                assert allowed is None or masks.unpack(allowed, vocab).expand(rows, -1)[row, token]


def test_hard_rows():
    """Ties across tiles, all equal, -inf, one huge value, two maxima far apart, NaN, inf, subnormal differences."""
    vocab, rows = 3 * TILE + 5, 12
    logits = torch.randn(rows, vocab)
    logits[0] = logits[0].round()
    logits[1] = 0
    logits[2, ::2] = -torch.inf
    logits[3, 7] = torch.nan
    logits[4, -1] = torch.inf
    logits[5] = -torch.inf
    logits[6, TILE] = 1e30
    logits[7, 3] = logits[7, -1] = 50
    logits[8] = torch.tensor([0.0, -0.0]).repeat(vocab)[:vocab]
    logits[9] = torch.linspace(-100, 0, vocab)
    logits[10, :TILE] = -torch.inf
    logits[11] = -1e30
    logits = logits.to(DEVICE)
    for temperature in (1.0, 0.0):
        for row in range(rows):  # the row is the bias of a product that is 0
            hidden, lm_head = torch.zeros(3, 4, device=DEVICE), torch.zeros(vocab, 4, device=DEVICE)
            given = {"temperature": temperature, "bias": logits[row], **noise(3)}
            out = assert_same(hidden, lm_head, **given)
            assert (out.token_ids.min() < 0) == (row in (3, 4, 5))
    banned = torch.zeros(vocab, dtype=torch.bool, device=DEVICE)
    banned[2 * TILE :] = True
    for row in range(rows):
        assert_same(hidden, lm_head, temperature=0.9, bias=logits[row], banned=banned, **noise(3))


def test_nothing_allowed():
    hidden, lm_head = exact(2, 8, 40)
    allowed = masks.pack(torch.tensor([[False] * 40, [True] * 40], device=DEVICE))
    out = assert_same(hidden, lm_head, temperature=1.0, allowed=allowed, **noise(2))
    assert out.token_ids[0] == -1
    assert out.logprobs[0].isnan()


@each_kernel
def test_a_tiny_loss_is_a_loss(backend):
    """log_kept is 0 if and only if nothing of positive probability was removed; a small loss keeps its digits."""
    vocab = 200
    hidden, lm_head = torch.zeros(1, 4, device=DEVICE), torch.zeros(vocab, 4, device=DEVICE)
    bias, banned = torch.zeros(vocab, device=DEVICE), torch.zeros(vocab, dtype=torch.bool, device=DEVICE)
    banned[150] = True
    for lost, expected in ((-20.0, -math.exp(-20) / 199), (-200.0, None), (-math.inf, 0.0)):
        bias[150] = lost
        given = {"temperature": 1.0, "bias": bias, "banned": banned, **noise(1)}
        (log_kept,) = draw(hidden, lm_head, backend, **given).log_kept.tolist()
        if expected is None:
            assert -1e-37 < log_kept < 0
        else:
            assert log_kept == pytest.approx(expected, rel=1e-5)


@each_kernel
def test_a_row_has_the_same_bits_alone_in_any_slot_and_batch(backend):
    rows, vocab = 70, 300
    hidden, lm_head = exact(rows, 96, vocab)
    if DEVICE.type == "cuda" or backend == "cpp":  # the interpreter's product, numpy's, rounds a row by its place
        hidden, lm_head = torch.randn_like(hidden), torch.randn_like(lm_head)
    seeds, steps = torch.arange(rows, device=DEVICE), torch.arange(rows, device=DEVICE)
    order = torch.randperm(rows, device=DEVICE)

    def bits(index):
        out = draw(hidden[index], lm_head, backend, temperature=0.8, seeds=seeds[index], steps=steps[index])
        return [out.token_ids, *(value.view(torch.int32) for value in out[1:])]

    whole = bits(torch.arange(rows, device=DEVICE))
    for got, want in zip(bits(order), whole, strict=True):
        assert torch.equal(got, want[order])
    for row in (0, 31, 69):
        alone = torch.tensor([row], device=DEVICE)
        for got, want in zip(bits(alone), whole, strict=True):
            assert torch.equal(got, want[alone])


@pytest.mark.parametrize("masked", [False, True])
def test_tile_shapes_change_no_token(monkeypatch, masked):
    """Rows and depth of a program change no bit of an exact product, ids of a tile no token; noise is of the id."""
    rows, vocab = 21, 700
    hidden, lm_head = exact(rows, 80, vocab)
    given = {"temperature": mixed_temperatures(rows), **noise(rows)}
    if masked:
        given["allowed"] = masks.pack(torch.rand(rows, vocab, device=DEVICE) < 0.3)
    whole = draw(hidden, lm_head, "triton", **given)
    for block, depth in ((16, 16), (16, 64), (64, 32)):
        monkeypatch.setattr(triton_kernel, "_FLOAT32", triton_kernel._Shape(block, depth, 8, 2))
        for got, want in zip(draw(hidden, lm_head, "triton", **given), whole, strict=True):
            assert torch.equal(got.view(torch.int32), want.view(torch.int32))
    for tile in (16, 64):
        monkeypatch.setattr(triton_kernel, "VOCAB_TILE", tile)
        tiled = draw(hidden, lm_head, "triton", **given)
        assert torch.equal(tiled.token_ids, whole.token_ids)
        for got, want in zip(tiled[1:], whole[1:], strict=True):
            torch.testing.assert_close(got, want, **VALUES)


@each_kernel
def test_rows_with_a_stride_and_no_rows(backend):
    hidden, lm_head = exact(4, 16, 50)
    given = {"temperature": 1.0, **noise(4)}
    wide, tall = torch.cat([hidden, hidden], 1), torch.cat([lm_head, lm_head], 1)
    got, want = draw(wide[:, :16], tall[:, :16], backend, **given), draw(hidden, lm_head, backend, **given)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    empty = draw(hidden[:0], lm_head, backend, temperature=1.0, **noise(0))
    assert [tuple(value.shape) for value in empty] == [(0,)] * 4


def test_truncated_rows_are_drawn_from_logits():
    hidden, lm_head = exact(5, 16, 100)
    assert_same(hidden, lm_head, temperature=1.0, top_k=5, **noise(5))
    assert_same(hidden, lm_head, temperature=0.8, top_p=0.9, min_p=0.01, **noise(5))


@each_kernel
def test_the_operator(backend):
    hidden, lm_head = exact(3, 8, 40)
    rows = torch.arange(3, device=DEVICE)
    allowed = masks.pack(torch.ones(40, dtype=torch.bool, device=DEVICE))[None]
    given = (hidden, lm_head, None, torch.ones(3, device=DEVICE), rows, rows, allowed, False, backend)
    torch.library.opcheck(torch.ops.foveate.sample_from_hidden.default, given)


def test_what_does_not_fit_is_named():
    hidden, lm_head = exact(2, 8, 40)
    given = {"temperature": 1.0, **noise(2)}
    with pytest.raises(ValueError, match=r"expected int32 \[2\] or \[2, 2\], got 'int64 \[2\]' \(allowed\)"):
        draw(hidden, lm_head, "triton", allowed=torch.ones(2, dtype=torch.int64, device=DEVICE), **given)
    with pytest.raises(ValueError, match=r"expected torch.float32 as hidden, got 'bfloat16 \[40, 8\]' \(lm_head\)"):
        draw(hidden, lm_head.bfloat16(), "triton", **given)
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        draw(hidden.double(), lm_head.double(), "triton", **given)


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 64, 5003])
def test_masks_are_bits(vocab):
    allowed = torch.rand(3, vocab) < 0.5
    words = masks.pack(allowed)
    assert words.shape == (3, masks.num_words(vocab))
    for row in range(3):
        value = sum(int(bit) << i for i, bit in enumerate(allowed[row]))
        assert [(value >> 32 * i) & 0xFFFFFFFF for i in range(words.shape[1])] == (
            words[row].long() & 0xFFFFFFFF
        ).tolist()
        assert torch.equal(masks.of_ids(allowed[row].nonzero().flatten().tolist(), vocab), words[row])
        assert [masks.has(words[row], token) for token in range(vocab)][:99] == allowed[row].tolist()[:99]
    assert torch.equal(masks.unpack(words, vocab), allowed)
    assert torch.equal(masks.pack(allowed.t().contiguous().t()), words)
    assert torch.equal(masks.pack(allowed[None, :, :].expand(2, 3, vocab)), torch.stack([words, words]))
    assert torch.equal(masks.pack(allowed[1]), words[1])
    assert masks.pack(allowed[:0]).shape == (0, words.shape[1])
    with pytest.raises(ValueError, match=r"\(allowed\)"):
        masks.unpack(words[:, :0], vocab)
    for beyond in (-1, vocab):
        with pytest.raises(ValueError, match=rf"expected ids in \[0, {vocab}\), got \[0, {beyond}\] \(ids\)"):
            masks.of_ids([0, beyond], vocab)


def test_logits_are_drawn_from_by_others():
    hidden, lm_head = exact(2, 8, 40)
    logits = hidden @ lm_head.T
    given = {"temperature": 1.0, **noise(2)}
    with pytest.raises(
        ValueError, match=r"expected one of .*'reference'.*, which sample has, got 'triton' \(backend\)"
    ):
        sampling.sample(logits, backend="triton", **given)
    with pytest.raises(ValueError, match=r"which score has, got 'triton' \(backend\)"):
        sampling.score(logits, torch.zeros_like(given["seeds"]), temperature=1.0, backend="triton")
    best = sampling.sample(logits, **given)
    for backend in ("layers=cpp,sampling=triton", "layers=triton"):  # of the family, which has it
        drawn = sampling.sample(logits, backend=backend, **given)
        assert all(torch.equal(a, b) for a, b in zip(drawn, best, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_of_16_bits_are_not_rounded_to_16_bits(dtype):
    hidden, lm_head = torch.randn(9, 512, device=DEVICE).to(dtype), torch.randn(1000, 512, device=DEVICE).to(dtype)
    bias = torch.randn(1000, device=DEVICE).to(dtype)
    logits = sampling.logits_of(hidden, lm_head, bias)
    assert logits.dtype == torch.float32
    exact = hidden.double() @ lm_head.double().T + bias.double()
    # The products are exact; a sum of 512 in any order is off by 512 half ulps of the sum of their magnitudes at most.
    bound = 512 * 2.0**-24 * (hidden.double().abs() @ lm_head.double().abs().T + bias.double().abs())
    assert bool(((logits - exact).abs() <= bound).all())


def test_the_engine_runs_on_it():
    """Plain, truncated and penalised requests in one batch: the same tokens as on the reference."""
    from foveate import Engine, EngineConfig, Request, SamplingParams
    from foveate.rollout.testing import tiny_model

    model = tiny_model("qwen3").to(DEVICE)
    many = [{}, {"top_k": 9}, {"temperature": 0.0}, {"frequency_penalty": 0.5}, {"min_tokens": 3}]
    requests = [
        Request([1, 2, 3], n=2, sampling=SamplingParams(max_tokens=5, seed=index, **given))
        for index, given in enumerate(many)
    ]
    results = []
    for backend in ("sampling=reference", "sampling=triton"):
        engine = Engine(model, None, EngineConfig(backend=backend, kv_memory=1 << 20, page_size=8))
        groups = [group for request in requests for group in engine.generate([request], strict=True)]
        results.append([[r.token_ids.tolist() for r in group.rollouts] for group in groups])
    assert results[0] == results[1]
