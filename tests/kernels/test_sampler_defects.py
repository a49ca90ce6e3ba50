"""What other samplers got wrong, each as a test here: ties, bounds, noise, broken rows, state in a CUDA graph."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from foveate.kernels import sampling
from foveate.kernels.sampling import masks, operators

HAS_GPU = torch.cuda.is_available()
GPU = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="no GPU")]
BACKENDS = ["reference", "cpp", pytest.param("cuda", marks=GPU)]


@pytest.fixture(params=BACKENDS)
def draw(request):
    """(logits, **arguments) -> SampleOutput on the CPU; seeds and steps by row unless given."""
    device = "cuda" if request.param == "cuda" else "cpu"

    def run(logits, **given) -> sampling.SampleOutput:
        rows = torch.arange(len(logits))
        given = {"temperature": 1.0, "seeds": rows, "steps": rows % 5, **given}
        given = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
        out = sampling.sample(logits.to(device), backend=request.param, **given)
        return sampling.SampleOutput(*(x.cpu() for x in out))

    return run


def same_bits(left, right) -> bool:
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("filters", [{"top_k": 2}, {"top_p": 0.69}, {"top_k": 2, "top_p": 0.9}], ids=str)
def test_ties_at_the_border_are_not_all_accepted(draw, filters, place):
    """0.4, 0.3, 0.3 cut to two: the lower id of the tie stays, wherever the largest stands."""
    shares = torch.full((3,), 0.3)
    shares[place] = 0.4
    drawn = {*draw(shares.log().repeat(600, 1), **filters).token_ids.tolist()}
    assert drawn == {place, min({0, 1, 2} - {place})}


def test_top_1_is_the_argmax_of_tied_bfloat16(draw):
    logits = (torch.randn(3000, 700) + 6).bfloat16()  # near 8 the format is coarse
    first = torch.from_numpy(logits.float().numpy().argmax(-1))  # numpy returns the first of equals
    assert int((logits == logits.amax(-1, keepdim=True)).sum(-1).gt(1).sum()) > 200
    for given in ({"top_k": 1}, {"temperature": 0.0}, {"top_p": 1e-6}, {"min_p": 1.0, "top_k": 1}):
        assert torch.equal(draw(logits, **given).token_ids, first)


@pytest.mark.parametrize("vocab", [1, 5, 31, 33, 63, 65, 1000, 4097])
def test_nothing_beyond_the_vocabulary_is_read_or_drawn(draw, vocab):
    """What lies behind a row, and bits of a mask beyond the last id, would win every draw."""
    wide = torch.full((60, vocab + 9), 1e9)
    wide[:, :vocab] = torch.randn(60, vocab)
    tight = wide[:, :vocab].contiguous()
    for given in ({}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}, {"temperature": 0.0}):
        out = draw(wide[:, :vocab], **given)
        assert int(out.token_ids.min()) >= 0
        assert int(out.token_ids.max()) < vocab
        assert same_bits(out, draw(tight, **given))
        everything = torch.full((60, masks.num_words(vocab)), -1, dtype=torch.int32)
        masked = draw(tight, **given, allowed=everything)
        assert torch.equal(masked.token_ids, out.token_ids)
        assert torch.equal(masked.log_kept == 0, out.log_kept == 0)


@pytest.mark.parametrize("filters", [{"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"banned": True}], ids=str)
def test_a_filter_of_one_row_changes_no_other(draw, filters):
    """The path is a row's own: a batch with one filtered row gives the others what a plain batch gives them."""
    logits = torch.randn(40, 1500) * 2
    off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "banned": torch.zeros(40, 1500, dtype=torch.bool)}
    ((name, value),) = filters.items()
    given = off[name].clone() if name == "banned" else torch.full((40,), off[name])
    given[17] = torch.arange(1500) % 2 == 0 if name == "banned" else value
    plain, mixed = draw(logits), draw(logits, **{name: given})
    others = torch.arange(40) != 17
    assert same_bits([x[others] for x in plain], [x[others] for x in mixed])
    assert mixed.log_kept[17] < 0


def test_each_row_has_its_own_seed_in_any_slot(draw):
    """Neither the first row's seed for all, nor the row number in the noise."""
    logits = torch.zeros(200, 900)
    seeds = torch.arange(200) * 7 + 3
    out = draw(logits, seeds=seeds, steps=torch.full((200,), 4))
    assert len({*out.token_ids.tolist()}) > 150
    order = torch.randperm(200)
    moved = draw(logits, seeds=seeds[order], steps=torch.full((200,), 4))
    assert same_bits(moved, [x[order] for x in out])
    few = draw(logits[:3], seeds=seeds[[150, 7, 99]], steps=torch.full((3,), 4))
    assert same_bits(few, [x[[150, 7, 99]] for x in out])


def test_min_p_takes_seeds(draw):
    logits = torch.zeros(300, 50)
    one, again, other = (draw(logits, min_p=0.5, seeds=torch.arange(300) + shift).token_ids for shift in (0, 0, 300))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("given", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}, {"temperature": 0.0}], ids=str)
def test_rows_of_infinities_and_nan_end(draw, given):
    """They return -1 and hang nothing, and rows whose ids are all -inf but a few draw these."""
    logits = torch.full((6, 300), -torch.inf)
    logits[1, 299] = torch.inf
    logits[2, 150] = torch.nan
    logits[3, [7, 250]] = -3e38
    logits[4, 123] = 3e38
    logits[5, [9, 11]] = 1e-45  # subnormal
    tokens = draw(logits, **given).token_ids.tolist()
    assert tokens[:3] == [-1] * 3
    assert tokens[3] in (7, 250)
    assert tokens[4] == 123
    assert tokens[5] in (9, 11)


@pytest.mark.parametrize("share", [1e-7, 1e-4, 1e-2])
def test_the_tail_is_drawn_as_often_as_its_share(draw, share):
    """An id of a small probability: noise with too coarse or too long a tail would draw it too often."""
    rows = 100_000
    logits = torch.tensor([[0.0, np.log(share / (1 - share))]]).repeat(rows, 1).float()
    count = int(draw(logits, seeds=torch.arange(rows) + 10**9).token_ids.sum())
    expected = rows * share
    assert abs(count - expected) <= 4.5 * np.sqrt(expected) + 1


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no GPU")
@pytest.mark.parametrize("filters", [False, True])
def test_a_graph_replays_with_the_steps_of_now(filters):
    """A replay reads seeds and steps from memory; none is frozen at the capture."""
    logits = torch.randn(33, 5003, device="cuda")
    seeds, steps = torch.arange(33, device="cuda"), torch.zeros(33, dtype=torch.int64, device="cuda")
    ones = torch.ones(33, device="cuda")
    limits = (torch.full_like(seeds, 50), ones * 0.9, ones * 0.01) if filters else (None, None, None)
    allowed = torch.full((1, masks.num_words(5003)), -1, dtype=torch.int32, device="cuda")

    def run():
        return operators.sample(logits, seeds, steps, ones, *limits, allowed, "cuda")

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids, values = run()
    seen = []
    for step in range(4):
        steps.fill_(step)
        seeds.add_(step)
        graph.replay()
        expected_ids, expected_values = run()
        assert torch.equal(ids, expected_ids)
        assert torch.equal(values, expected_values)
        seen.append(ids.tolist())
    assert len({tuple(row) for row in seen}) == 4


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no GPU")
def test_a_fused_draw_in_a_graph_replays_with_the_steps_of_now():
    hidden, lm_head = torch.randn(5, 64, device="cuda").bfloat16(), torch.randn(3000, 64, device="cuda").bfloat16()
    seeds, steps = torch.arange(5, device="cuda"), torch.zeros(5, dtype=torch.int64, device="cuda")
    given = (hidden, lm_head, None, torch.ones(5, device="cuda"), seeds, steps, None, False)
    operators.sample_from_hidden(*given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids, _ = operators.sample_from_hidden(*given)
    seen = set()
    for step in range(4):
        steps.fill_(step)
        graph.replay()
        assert torch.equal(ids, operators.sample_from_hidden(*given)[0])
        seen.add(tuple(ids.tolist()))
    assert len(seen) == 4
