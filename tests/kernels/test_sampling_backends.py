"""The compiled samplers against the reference, token for token, on rows that are meant to be hard."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from foveate.kernels import sampling
from foveate.kernels.sampling import philox, reference

ROWS = 128
VOCABS = (1, 3, 5, 62, 271, 4095, 4096, 5003, 49_152)
CASES = ("plain", "filters", "greedy", "banned", "banned_top_p", "everything")
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
COMPILED = ["cpp", pytest.param("cuda", marks=GPU)]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ROUNDS = ((1.0, F32), (4.0, F32), (25.0, F32), (4.0, BF16), (9.0, F16))  # spread of the logits, their type


def on(backend: str, given: dict) -> dict:
    """The tensors among the arguments where the backend reads them."""
    device = "cuda" if backend == "cuda" else "cpu"
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in given.items()}


def draw(backend: str, **given) -> sampling.SampleOutput:
    """Results on the CPU."""
    return sampling.SampleOutput(*(x.cpu() for x in sampling.sample(backend=backend, **on(backend, given))))


def hard_logits(vocab: int, scale: float, generator: torch.Generator) -> torch.Tensor:
    """Rows of normal logits, and among them: ties in blocks, all equal, -inf, NaN, +inf, subnormals, one huge value,
    bfloat16 collisions, two equal maxima far apart."""
    logits = torch.randn(ROWS, vocab, generator=generator) * scale
    logits[0] = logits[0].round()
    logits[1] = 0
    logits[2, ::2] = -torch.inf
    logits[3, 0] = torch.nan
    logits[4, -1] = torch.inf
    logits[5] = -torch.inf
    logits[6] *= 1e-42
    logits[7, vocab // 2] = 1e30
    logits[8:40] = logits[8:40].bfloat16().float()
    logits[40, 0] = logits[40, -1] = logits[40].max() + 1
    logits[41] = torch.tensor([0.0, -0.0]).repeat(vocab)[:vocab]
    logits[42] = torch.linspace(-100, 0, vocab)
    return logits


def arguments(case: str, vocab: int, generator: torch.Generator) -> dict:
    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    banned = uniform(ROWS, vocab) < 0.3
    off = uniform(ROWS) < 0.3
    filters = {
        "temperature": uniform(ROWS) + 0.1,
        "top_k": torch.randint(0, 2 * vocab, (ROWS,), generator=generator) // torch.randint(1, 50, (ROWS,)),
        "top_p": torch.where(off, 1.0, uniform(ROWS).clamp(min=1e-3)),
        "min_p": torch.where(uniform(ROWS) < 0.5, 0.0, uniform(ROWS) ** 3),
    }
    return {
        "plain": {"temperature": 1.0},
        "filters": filters,
        "greedy": {"temperature": 0.0, "banned": banned, "top_k": 1},
        "banned": {"temperature": 1.0, "banned": banned},
        "banned_top_p": {"temperature": 0.7, "top_p": 0.9, "banned": banned[0]},
        "everything": {**filters, "temperature": torch.where(off, 0.0, filters["temperature"]), "banned": banned},
    }[case]


def near_tie(logits: torch.Tensor, temperature: float, seed: int, step: int, ids: list[int]) -> bool:
    """Whether the scores of two ids lie within 8 ulp: backends may differ by 4 ulp in the noise."""
    words = philox.noise_words(torch.tensor([seed]), torch.tensor([step]), len(logits))[0].long() & philox.MASK
    scores = (logits / temperature + reference.gumbel(words)[: len(logits)])[ids].numpy()
    return abs(float(scores[0]) - float(scores[1])) <= 8 * float(np.spacing(np.abs(scores).max()))


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("vocab", VOCABS)
def test_same_tokens_and_values(backend, case, vocab):
    """Together 31,488 rows for a backend; the others than NaN, inf and nothing allowed have a token."""
    generator = torch.Generator().manual_seed(vocab)
    assert compare(backend, case, vocab, ROUNDS if vocab < 40_000 else ROUNDS[3:4], generator) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("case", CASES)
def test_the_largest_vocabulary(backend, case):
    assert compare(backend, case, 2**18, ROUNDS[2:4], torch.Generator().manual_seed(18)) <= 2


def compare(backend: str, case: str, vocab: int, rounds, generator: torch.Generator) -> int:
    """Asserts that tokens, values and scores are the reference's; returns how many rows were near ties."""
    ties = 0
    for scale, dtype in rounds:
        logits = hard_logits(vocab, scale, generator).to(dtype)
        given = {"logits": logits, **arguments(case, vocab, generator)}
        seeds = torch.randint(-(2**62), 2**62, (ROWS,), generator=generator)
        steps = torch.randint(0, 2**32, (ROWS,), generator=generator)
        ours, theirs = (draw(name, seeds=seeds, steps=steps, **given) for name in (backend, "reference"))
        for row in (ours.token_ids != theirs.token_ids).nonzero()[:, 0].tolist():
            t = given["temperature"] if isinstance(given["temperature"], float) else float(given["temperature"][row])
            ids = [int(ours.token_ids[row]), int(theirs.token_ids[row])]
            assert min(ids) >= 0
            assert near_tie(logits[row].float(), t, int(seeds[row]), int(steps[row]), ids), (row, ids)
            ties += 1
        same = ours.token_ids == theirs.token_ids
        for got, want in zip(ours[1:], theirs[1:], strict=True):
            torch.testing.assert_close(got[same], want[same], rtol=1e-6, atol=4e-6, equal_nan=True)
        assert torch.equal(ours.log_kept == 0, theirs.log_kept == 0)
        given["token_ids"] = ours.token_ids.clamp(min=0)
        for got, want in zip(sampling.score(backend=backend, **on(backend, given)), ours[1:], strict=True):
            assert torch.equal(got.cpu().view(torch.int32), want.view(torch.int32))
    return ties


@pytest.mark.parametrize("backend", COMPILED)
def test_a_row_gives_the_same_bits_alone_and_in_any_batch(backend):
    generator = torch.Generator().manual_seed(0)
    for vocab in (62, 271, 5003):
        logits = torch.randn(33, vocab, generator=generator) * 3
        seeds, steps = torch.arange(33), torch.arange(33)
        given = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "banned": torch.arange(vocab) % 9 == 4}
        whole = draw(backend, logits=logits, seeds=seeds, steps=steps, **given)
        for row in range(0, 33, 8):
            one = slice(row, row + 1)
            given |= {"seeds": seeds[one], "steps": steps[one]}
            alone = draw(backend, logits=logits[one], **given)
            strided = draw(backend, logits=logits.repeat(1, 2)[one, :vocab], **given)
            for together, single, apart in zip(whole, alone, strided, strict=True):
                assert torch.equal(together[one].view(torch.int32), single.view(torch.int32))
                assert torch.equal(single.view(torch.int32), apart.view(torch.int32))


def test_operators_are_registered():
    logits, rows = torch.randn(2, 7), torch.arange(2)
    given = (
        torch.ones(2),
        rows,
        torch.full((2,), 0.9),
        torch.zeros(2),
        torch.full((1, 1), 127, dtype=torch.int32),
        "cpp",
    )
    torch.library.opcheck(torch.ops.foveate.sample.default, (logits, rows, rows, *given))
    torch.library.opcheck(torch.ops.foveate.score_tokens.default, (logits, rows, *given))


def test_what_does_not_fit_is_named():
    logits, rows = torch.randn(2, 7), torch.arange(2)
    parameters = (torch.ones(2), None, None, None)
    with pytest.raises(ValueError, match=r"expected \[1 or 2, 1\], got \[3, 1\] \(allowed\)"):
        torch.ops.foveate.sample(logits, rows, rows, *parameters, torch.zeros(3, 1, dtype=torch.int32), "cpp")
    with pytest.raises(
        ValueError, match=r"expected \[N=2\] int64, contiguous, on cpu, got \[3\] int64 on cpu \(seeds\)"
    ):
        torch.ops.foveate.sample(logits, torch.arange(3), rows, *parameters, None, "cpp")
    for wrong in (-1, 7, 2**40, -(2**62)):
        for place in (0, 1):
            ids = torch.tensor([6, 0])
            ids[place] = wrong
            with pytest.raises(ValueError, match=rf"expected ids in \[0, 7\), got {wrong} \(given\)"):
                torch.ops.foveate.score_tokens(logits, ids, *parameters, None, "cpp")
