"""The policy losses in Triton: as close to float64 as plain float32 code, for every kind and option."""

import itertools
import math

import pytest
import torch

from foveate.kernels.dispatch import available
from foveate.kernels.policy_loss import (
    PolicyLossOptions,
    add_metrics,
    linear_policy_loss,
    logprob_policy_loss,
)
from foveate.kernels.policy_loss.reference import loss as reference
from foveate.kernels.policy_loss.reference.loss import METRICS, Tokens
from foveate.testing.tolerance import assert_as_exact_as

pytest.importorskip("triton")
triton_loss = pytest.importorskip("foveate.kernels.policy_loss.triton_loss")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [
    pytest.mark.skipif("triton" not in available("policy_loss", DEVICE), reason="needs Triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of rows without target in the interpreter
]

CLIPS = {"clip_low": 0.2, "clip_high": 0.3}
NARROW = {"clip_low": 0.02, "clip_high": 0.03}
BOUNDS = {
    "grpo": CLIPS,
    "gspo": NARROW,
    "gspo_token": NARROW,
    "cispo": CLIPS,
    "cispo_max": {"clip_high": 1.1},
    "sapo": {"sapo_temperature_pos": 1, "sapo_temperature_neg": 1.3},
}
OPTIONS = {
    "token": {"aggregation": "token"},
    "sequence": {"aggregation": "sequence"},
    "entropy": {"aggregation": "token", "entropy_coef": 1},  # an int, which Triton would compile in
    "tis": {"aggregation": "token", "correction": "tis", "correction_high": 1.1},
    "tis_sequence": {"aggregation": "token", "correction": "tis_sequence", "correction_high": 1.2},
    "mis": {"aggregation": "sequence", "correction": "mis", "correction_low": 0.8, "correction_high": 1.2},
    "mis_sequence": {"correction": "mis_sequence", "correction_low": 0.6, "correction_high": 1.5},
    "geometric": {"aggregation": "token", "rejection": "geometric", "rejection_low": 0.98, "rejection_high": 1.02},
    "k3_rejection": {"aggregation": "token", "rejection": "k3", "rejection_high": 0.02},
    "off_policy": {"aggregation": "token", "off_policy_limit": 0.05},
    "all": {"correction": "tis", "correction_high": 1.2, "rejection": "geometric", "rejection_low": 0.9,
            "rejection_high": 1.1, "off_policy_limit": 0.1, "kl_coef": 0.3, "entropy_coef": 0.1},
}  # fmt: skip
CLIP_OPTIONS = {"dual_clip": {"dual_clip": 1.4}, "delta": {"delta": 1.4}}
KL_OPTIONS = {
    "weighted_kl": {"kl_coef": 0.7, "kl_ratio_weighted": True, "kl_gradient": "value"},
    **{
        f"{kind}_{gradient}": {"aggregation": "token", "kl_coef": 0.7, "kl_kind": kind, "kl_gradient": gradient}
        for kind, gradient in itertools.product(("k1", "k2", "k3"), ("value", "straight_through"))
    },
}
CASES = [
    *itertools.product(BOUNDS, OPTIONS.items()),
    *itertools.product(("grpo", "gspo", "gspo_token"), CLIP_OPTIONS.items()),
    *itertools.product(("grpo",), KL_OPTIONS.items()),
]


def problem(lengths=(300, 1, 0, 40, 259), dtype=torch.float32, spread=1.0):
    draw = torch.Generator().manual_seed(5)
    count, size = sum(lengths), len(lengths)
    noise = [torch.randn(count, generator=draw) * scale * spread for scale in (0.35, 0.2, 0.5)]
    logprobs, entropy = -torch.rand(count, generator=draw) * 5, torch.rand(count, generator=draw)
    mask = torch.rand(count, generator=draw) < 0.9
    old = logprobs + noise[0]
    vectors = {"old_logprobs": old, "rollout_logprobs": old + noise[1], "ref_logprobs": logprobs + noise[2]}
    signs = 1 - 2 * (torch.arange(size) % 2)
    # Where nothing may be read.
    vectors = {name: x.masked_fill(~mask, float("nan")).to(dtype) for name, x in vectors.items()}
    data = {
        **vectors,
        "mask": mask,
        "sequence_ids": torch.arange(size, dtype=torch.int32).repeat_interleave(torch.tensor(lengths).long()),
        "advantages": (torch.rand(size, generator=draw) * signs).to(dtype),
    }
    on_device = {name: x.to(DEVICE) for name, x in data.items()}
    return (logprobs.to(DEVICE, dtype), entropy.to(DEVICE, dtype)), on_device


def evaluate(backend, dtype, kind, options, without=(), **given):
    vectors, data = problem(dtype=dtype, **given)
    data.update(dict.fromkeys(without))
    leaves = [x.clone().requires_grad_() for x in vectors]
    choice = PolicyLossOptions(**options)
    out = logprob_policy_loss(*leaves, **data, denominator=7.0, kind=kind, options=choice, backend=backend)
    out.loss.backward()
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
    return [out.loss.detach(), *grads], out.metrics


def magnitude(kind, options, lengths=None, spread=1.0, without=()):
    """Sum of |w_i value_i| / denominator in float64: what the rounding of a sum of either sign is measured by."""
    vectors, data = problem(**({} if lengths is None else {"lengths": lengths}), dtype=torch.float64, spread=spread)
    data.update(dict.fromkeys(without))
    data["sequence_ids"], data["active"] = data["sequence_ids"].long(), data.pop("mask")
    names = {"old": "old_logprobs", "rollout": "rollout_logprobs", "ref": "ref_logprobs"}
    tokens = Tokens(*vectors, **{k: data.get(names.get(k, k)) for k in Tokens._fields[2:]})
    formula = PolicyLossOptions(**options).resolve(kind)
    terms = reference.token_terms(tokens, formula)
    value = terms.policy + formula.kl_coef * terms.kl - formula.entropy_coef * terms.entropy
    return float((reference.token_weights(tokens, formula.aggregation) * value)[tokens.active].abs().sum() / 7)


def compare(kind, options, **given):
    exact, exact_metrics = evaluate("reference", torch.float64, kind, options, **given)
    plain, plain_metrics = evaluate("reference", torch.float32, kind, options, **given)
    got, metrics = evaluate("triton", torch.float32, kind, options, **given)
    for x, true, simple in zip(got[1:], exact[1:], plain[1:], strict=True):
        assert_as_exact_as(x, true, simple, cancels=True)
    allowed = 2 * abs(plain[0].double() - exact[0]) + magnitude(kind, options, **given) * 2**-22
    assert abs(got[0].double() - exact[0]) <= allowed
    assert list(metrics) == list(exact_metrics)
    for name, true in exact_metrics.items():
        if name in ("tokens", "clip_low", "clip_high", "clip_dual", "dropped"):
            assert metrics[name] == true, name
        else:  # sums of float32 numbers, of one sign but for mismatch_k1, whose terms are of the order of 1
            scale = max(float(exact_metrics["tokens"]), abs(float(true)))
            assert abs(metrics[name] - true) <= 2 * abs(plain_metrics[name] - true) + scale * 2**-22, name


@pytest.mark.parametrize(("kind", "case"), CASES, ids=lambda x: x if isinstance(x, str) else x[0])
def test_every_kind_and_option(kind, case):
    compare(kind, {**BOUNDS[kind], **case[1]})


@pytest.mark.parametrize("without", [("old_logprobs",), ("rollout_logprobs", "ref_logprobs"),
                                     ("old_logprobs", "rollout_logprobs", "ref_logprobs")], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", list(BOUNDS))
def test_logprobs_that_are_not_given(kind, without):
    compare(kind, {**BOUNDS[kind], "aggregation": "sequence"}, without=without)


@pytest.mark.parametrize(
    "lengths", [(), (0,), (1,), (255,), (256, 1), (0, 513, 0), (1,) * 9], ids=lambda x: f"{len(x)}x{sum(x)}"
)
@pytest.mark.parametrize("kind", ["grpo", "gspo"])
def test_sizes(kind, lengths):
    compare(kind, {**BOUNDS[kind], **OPTIONS["all"]}, lengths=lengths)


@pytest.mark.parametrize("kind", ["grpo", "gspo", "cispo", "sapo"])
def test_log_ratios_beyond_the_clamp(kind):
    compare(kind, {**BOUNDS[kind], "aggregation": "token", "kl_coef": 0.1, "kl_gradient": "value"}, spread=60.0)


@pytest.mark.parametrize("kind", ["grpo", "gspo"])
def test_micro_batches_of_whole_sequences_add_up(kind):
    vectors, data = problem()
    options = PolicyLossOptions(**BOUNDS[kind], **OPTIONS["all"])

    def run(part):
        rows = torch.isin(data["sequence_ids"], torch.tensor(part, dtype=torch.int32, device=DEVICE))
        picked = {n: x if n == "advantages" else x[rows] for n, x in data.items()}
        leaf = vectors[0][rows].clone().requires_grad_()
        out = logprob_policy_loss(
            leaf, vectors[1][rows], **picked, denominator=7.0, kind=kind, options=options, backend="triton"
        )
        out.loss.backward()
        return out.loss.detach().double(), leaf.grad, out.metrics

    whole, parts = run([0, 1, 2, 3, 4]), [run([s]) for s in range(5)]
    assert torch.equal(
        torch.cat([part[1] for part in parts]), whole[1]
    )  # a token's gradient depends on its sequence alone
    torch.testing.assert_close(sum(part[0] for part in parts), whole[0], rtol=1e-6, atol=1e-7)
    total = add_metrics([part[2] for part in parts])
    for name, value in whole[2].items():
        torch.testing.assert_close(total[name], value, rtol=1e-6, atol=1e-6)


WRONG = {"two_runs": [0, 0, 1, 0, 2], "beyond": [0, 0, 1, 2, 3], "negative": [-1, 0, 1, 1, 2]}


def loss_of_ids(ids, kind, aggregation):
    some = torch.zeros(5, device=DEVICE)
    where = (
        torch.tensor(ids, dtype=torch.int32, device=DEVICE),
        torch.ones(5, dtype=torch.bool, device=DEVICE),
        torch.ones(3, device=DEVICE),
    )
    formula = PolicyLossOptions(aggregation=aggregation).resolve(kind)
    one = torch.tensor(1.0, dtype=torch.float64, device=DEVICE)
    return triton_loss.policy_loss(Tokens(some - 1, some, some - 1, None, None, *where), formula, one)[0]


@pytest.mark.parametrize("ids", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("kind", ["grpo", "gspo"])
def test_wrong_sequence_ids_give_nan(kind, ids):
    """As on a GPU, where nobody looks at them before."""
    assert loss_of_ids(ids, kind, "sequence").isnan()
    assert loss_of_ids([0, 0, 2, 1, 1], kind, "sequence") == -3


def test_only_the_range_of_ids_matters_where_no_sequence_counts_as_a_whole():
    assert loss_of_ids(WRONG["two_runs"], "grpo", "token") == -5
    assert loss_of_ids(WRONG["beyond"], "grpo", "token").isnan()
    assert loss_of_ids(WRONG["negative"], "grpo", "token").isnan()


def test_a_run_with_a_foreign_token_gives_nan():
    """Two runs of one sequence may leave the start of the one and the end of the other."""
    some, sums = torch.zeros(3, device=DEVICE), torch.zeros(1, triton_loss.NUM_SUMS, device=DEVICE)
    ids = torch.tensor([0, 1, 0], dtype=torch.int32, device=DEVICE)
    active = torch.ones(3, dtype=torch.bool, device=DEVICE)
    tokens = Tokens(some, some, None, None, None, ids, active, torch.ones(1, device=DEVICE))
    flags = triton_loss._sequence_flags(tokens, PolicyLossOptions().resolve("grpo"))
    bounds = [torch.tensor([place], dtype=torch.int32, device=DEVICE) for place in (0, 3)]
    pointers = (some, some, some, ids, active.view(torch.uint8), tokens.advantages, *bounds, sums)
    triton_loss.sequence_kernel[(1,)](*pointers, *(0.0,) * 5, **flags)
    assert sums[0, 0].isnan()
    assert sums[0, 2].isnan()


def test_a_small_k3_keeps_its_digits():
    """e^-d + d - 1 as it stands has none left of a d of 1e-3 in float32."""
    ids, zero = torch.zeros(50, dtype=torch.int32, device=DEVICE), torch.zeros(50, device=DEVICE)
    distance = torch.linspace(-2e-3, 2e-3, 50, device=DEVICE)
    out = logprob_policy_loss(
        distance, zero, advantages=zero[:1], sequence_ids=ids, denominator=1.0, ref_logprobs=zero,
        options=PolicyLossOptions(kl_coef=1.0, aggregation="token"), backend="triton",
    )  # fmt: skip
    d = distance.double()
    expected = (torch.expm1(-d) + d).sum()
    assert abs(out.loss.double() - expected) <= 8 * 2**-23 * expected


def test_many_programs_fill_more_than_one_tile_of_partial_sums(monkeypatch):
    monkeypatch.setattr(triton_loss, "TOTAL_ROWS", 2)
    monkeypatch.setattr(triton_loss, "BLOCK", 64)
    compare("grpo", {**BOUNDS["grpo"], **OPTIONS["all"]})


def test_numbers_reach_triton_as_floats():
    """It would compile an int 1 in, and once more for every other value."""
    formula = PolicyLossOptions(kl_coef=1, dual_clip=2, clip_low=1).resolve("grpo")
    numbers = triton_loss._numbers(formula, triton_loss._TOKEN_NUMBERS + triton_loss._SEQUENCE_NUMBERS)
    assert all(type(number) is float for number in numbers)


@pytest.mark.parametrize("kind", ["grpo", "gspo"])
def test_nan_shows(kind):
    for name in ("advantages", "old_logprobs", "rollout_logprobs", "ref_logprobs"):
        vectors, data = problem()
        data[name][0] = float("nan")
        data["mask"][0] = True
        wide = {"correction": "mis", "correction_low": 0.0, "correction_high": 1e9}
        options = PolicyLossOptions(**BOUNDS[kind], **wide, aggregation="token", kl_coef=0.1)
        out = logprob_policy_loss(*vectors, **data, denominator=1.0, kind=kind, options=options, backend="triton")
        assert out.loss.isnan(), name
        expected = logprob_policy_loss(
            *vectors, **data, denominator=1.0, kind=kind, options=options, backend="reference"
        ).metrics
        assert {n for n, x in out.metrics.items() if x.isnan()} == {n for n, x in expected.items() if x.isnan()}, name
        assert out.metrics["ratio_max"].isnan() == (name == "old_logprobs")
        assert out.metrics["mismatch_abs_max"].isnan() == (name in ("old_logprobs", "rollout_logprobs"))


EXPONENTIAL = 4 * 2**-23  # e^20 to an ulp, and a few roundings of what is made of it


def of_one_sequence(logprobs, kind, options, advantage, **given):
    """Loss, its gradient and the metrics of a sequence."""
    leaf, count = logprobs.to(DEVICE).requires_grad_(), len(logprobs)
    out = logprob_policy_loss(
        leaf, torch.zeros(count, device=DEVICE), advantages=torch.tensor([advantage], device=DEVICE), denominator=1.0,
        sequence_ids=torch.zeros(count, dtype=torch.int32, device=DEVICE), kind=kind, options=options,
        backend="triton", **{name: x.to(DEVICE) for name, x in given.items()},
    )  # fmt: skip
    out.loss.backward()
    return float(out.loss.detach()), leaf.grad, out.metrics


@pytest.mark.parametrize("shift", [30.0, -30.0])
@pytest.mark.parametrize("kind", ["gspo", "gspo_token"])
def test_the_log_ratio_of_a_sequence_is_clamped(kind, shift):
    logprobs = torch.linspace(-40.0, -35.0, 7)
    advantage = -math.copysign(1.0, shift)  # of the sign whose bound the ratio does not pass
    loss, grad, metrics = of_one_sequence(logprobs, kind, PolicyLossOptions(), advantage, old_logprobs=logprobs - shift)
    ratio = math.exp(math.copysign(20.0, shift))
    assert loss == pytest.approx(-advantage * ratio, rel=EXPONENTIAL)
    assert float(metrics["ratio_max"]) == pytest.approx(ratio, rel=EXPONENTIAL)
    assert not grad.any()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_correction_of_a_sequence_is_clamped(sign):
    logprobs = torch.full((40,), -3.0)
    options = PolicyLossOptions(correction="tis_sequence", correction_high=math.inf)
    given = {"old_logprobs": logprobs, "rollout_logprobs": logprobs - sign}
    loss, grad, metrics = of_one_sequence(logprobs.clone(), "grpo", options, -1.0, **given)
    factor = math.exp(20.0 * sign)
    assert loss == pytest.approx(factor, rel=EXPONENTIAL)
    assert float(metrics["correction"]) / 40 == pytest.approx(factor, rel=EXPONENTIAL)
    expected = torch.full((40,), factor / 40, device=DEVICE)
    torch.testing.assert_close(grad, expected, rtol=EXPONENTIAL, atol=0)


def test_straight_from_hidden_states():
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 16, generator=generator).to(DEVICE) for n in (33, 50))
    targets = torch.randint(50, (33,), generator=generator).to(DEVICE)
    targets[4] = -100
    ids = torch.tensor([0, 1], dtype=torch.int32).repeat_interleave(torch.tensor([11, 22])).to(DEVICE)
    results = []
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "reference"), (torch.float32, "triton")):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, head)]
        out = linear_policy_loss(
            *leaves, targets, advantages=torch.tensor([1.0, -1.0], device=DEVICE), sequence_ids=ids, denominator=2.0,
            kind="sapo", options=PolicyLossOptions(entropy_coef=0.1), backend=backend,
        )  # fmt: skip
        out.loss.backward()
        results.append([out.loss.detach(), *(x.grad for x in leaves)])
    for exact, plain, got in zip(*results, strict=True):
        assert_as_exact_as(got, exact, plain, cancels=True)


def test_the_columns_are_those_of_the_metrics():
    assert [name.endswith("_max") for name in METRICS[-triton_loss.NUM_MAXIMA :]] == [True] * triton_loss.NUM_MAXIMA
    assert not any(name.endswith("_max") for name in METRICS[: -triton_loss.NUM_MAXIMA])
