"""linear_policy_loss against the formulas of the papers, written out sequence by sequence, in float64."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from foveate.kernels.policy_loss import (
    PolicyLossOptions,
    add_metrics,
    group_advantage,
    linear_logprobs,
    linear_policy_loss,
    mean_metrics,
)
from foveate.kernels.policy_loss.reference import logprobs as chunks

WIDTH, VOCAB, LENGTHS = 4, 9, (9, 1, 0, 17, 8, 14)  # the third sequence has no tokens
CLIPS = {"clip_low": 0.2, "clip_high": 0.3}
# kind -> what sets its bounds in these tests, the same ratios apart for whole sequences
BOUNDS = {
    "grpo": CLIPS,
    "dr_grpo": CLIPS,
    "dapo": CLIPS,
    "gspo": {"clip_low": 0.05, "clip_high": 0.1},
    "gspo_token": {"clip_low": 0.05, "clip_high": 0.1},
    "cispo": CLIPS,
    "cispo_max": {"clip_high": 1.1},
    "sapo": {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.3},
}
OPTIONS = {
    "plain": {},
    "token": {"aggregation": "token"},
    "sequence": {"aggregation": "sequence"},
    "constant": {"aggregation": "constant"},
    "dual_clip": {"dual_clip": 1.4},
    "delta": {"delta": 1.4},
    "entropy": {"entropy_coef": 0.05},
    "tis": {"correction": "tis", "correction_high": 1.1},
    "tis_unbounded": {"correction": "tis", "correction_high": float("inf")},
    "tis_sequence": {"correction": "tis_sequence", "correction_high": 1.2},
    "mis": {"correction": "mis", "correction_low": 0.8, "correction_high": 1.2},
    "mis_sequence": {"correction": "mis_sequence", "correction_low": 0.6, "correction_high": 1.5},
    "geometric": {"rejection": "geometric", "rejection_low": 0.9, "rejection_high": 1.1},
    "k3_rejection": {"rejection": "k3", "rejection_high": 0.04},
    "off_policy": {"off_policy_limit": 0.1},
    "all": {"correction": "mis", "correction_low": 0.7, "correction_high": 1.3, "off_policy_limit": 0.1,
            "rejection": "geometric", "rejection_low": 0.9, "rejection_high": 1.1, "kl_coef": 0.3, "entropy_coef": 0.1},
    "weighted_kl": {"kl_coef": 0.7, "kl_ratio_weighted": True, "kl_gradient": "value"},
    **{
        f"{kind}_{gradient}": {"kl_coef": 0.7, "kl_kind": kind, "kl_gradient": gradient}
        for kind, gradient in itertools.product(("k1", "k2", "k3"), ("value", "straight_through"))
    },
}  # fmt: skip


def legal(kind, name):
    options = OPTIONS[name]
    if name in ("dual_clip", "delta"):
        return kind not in ("cispo", "cispo_max", "sapo")
    if name == "weighted_kl":
        return not kind.startswith("gspo")
    fixed = {"dr_grpo": "constant", "dapo": "token"}.get(kind)
    return fixed is None or options.get("aggregation", fixed) == fixed


LEGAL = [(kind, name) for kind in BOUNDS for name in OPTIONS if legal(kind, name)]
PUBLISHED_AGGREGATION = {"dr_grpo": "constant", "dapo": "token", "cispo": "token", "cispo_max": "token"}


def problem(lengths=LENGTHS, dtype=torch.float64, seed=4):
    """Tensors of a batch whose ratios lie on both sides of every bound; some tokens are masked or ignored."""
    draw = torch.Generator().manual_seed(seed)
    count, size = sum(lengths), len(lengths)
    hidden, head, bias = (torch.randn(*s, generator=draw).to(dtype) for s in ((count, WIDTH), (VOCAB, WIDTH), (VOCAB,)))
    targets = torch.randint(VOCAB, (count,), generator=draw)
    logprobs = linear_logprobs(hidden.double(), head.double(), targets, bias=bias.double(), temperature=0.8).logprobs
    spread = [torch.randn(count, generator=draw).double() * scale for scale in (0.35, 0.2, 0.5)]
    ids = torch.arange(size, dtype=torch.int32).repeat_interleave(torch.tensor(lengths).long())
    # The fifth sequence of LENGTHS is nearly on policy in every respect, the others are not.
    near = torch.where(ids == 4, 0.1, 1.0).double()
    old = logprobs + near * spread[0]
    data = {
        "old_logprobs": old,
        "rollout_logprobs": old + near * spread[1],
        "ref_logprobs": logprobs + spread[2],
        "sequence_ids": torch.arange(size, dtype=torch.int32).repeat_interleave(
            torch.tensor(lengths, dtype=torch.int64)
        ),
        "advantages": torch.randn(size, generator=draw).double().abs() * (1 - 2 * (torch.arange(size) % 2)),
        "mask": torch.rand(count, generator=draw) < 0.85,
    }
    targets[3::7] = -100
    return (hidden, head, bias, targets), data


def materialised(hidden, head, bias, targets, temperature):
    logits = (hidden @ head.T + bias) / temperature
    log_p = logits.log_softmax(-1)
    return log_p.gather(1, targets.clamp(min=0)[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def policy_terms(kind, logprobs, old, advantage, o):
    """[T] for one sequence, by the case distinctions of the papers."""
    ratio = (logprobs - old).exp()
    if kind == "gspo":
        ratio = (logprobs - old).mean().exp().expand_as(logprobs)
    elif kind == "gspo_token":
        ratio = (logprobs - old).mean().exp().detach() * logprobs.exp() / logprobs.exp().detach()
    if kind == "sapo":
        tau = o["sapo_temperature_pos"] if advantage > 0 else o["sapo_temperature_neg"]
        return -advantage * 4 / tau / (1 + torch.exp(-tau * (ratio - 1)))
    if kind == "cispo_max":
        return -advantage * ratio.detach().clamp(max=o["clip_high"]) * logprobs
    low, high = 1 - o["clip_low"], 1 + o["clip_high"]
    if kind == "cispo":
        return -advantage * ratio.detach().clamp(low, high) * logprobs
    if advantage >= 0:
        return -advantage * torch.where(ratio > high, high, ratio)
    cap = o.get("dual_clip") or o.get("delta") or float("inf")
    return -advantage * torch.where(ratio > cap, cap, torch.where(ratio < low, low, ratio))


def factors(old, rollout, current, advantage, o):
    """[T]: the mismatch corrections of one sequence."""
    ratio = (old - rollout).exp()
    correction, low, high = (o.get(name) for name in ("correction", "correction_low", "correction_high"))
    weight = {None: torch.ones_like(ratio), "tis": ratio, "mis": ratio}.get(correction, ratio.prod().expand_as(ratio))
    if correction in ("tis", "tis_sequence"):
        weight = weight.clamp(max=high)
    elif correction is not None:
        weight = weight * ((weight >= low) & (weight <= high))
    if o.get("rejection") == "geometric":
        weight = weight * (o["rejection_low"] <= ratio.log().mean().exp() <= o["rejection_high"])
    if o.get("rejection") == "k3":
        weight = weight * ((ratio - ratio.log() - 1).mean() <= o["rejection_high"])
    if "off_policy_limit" in o and advantage < 0:
        weight = weight * ((rollout - current).mean() <= o["off_policy_limit"])
    return weight.detach()


def penalty(logprobs, ref, ratio, o):
    d = logprobs - ref
    estimates = {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) + d - 1}
    value = estimates[o.get("kl_kind", "k3")]
    if o.get("kl_ratio_weighted"):
        return value * ratio
    if o.get("kl_gradient", "straight_through") == "value":
        return value
    return value.detach() + estimates["k2"] - estimates["k2"].detach()


def truth(leaves, data, denominator, kind, o):
    """Loss of the fully materialised formula, a sequence at a time."""
    logprobs, entropy = materialised(*leaves, temperature=0.8)
    active = (leaves[3] != -100) & data["mask"]
    old = logprobs.detach() if data["old_logprobs"] is None else data["old_logprobs"]
    aggregation = o.get("aggregation", PUBLISHED_AGGREGATION.get(kind, "sequence"))
    total = logprobs.sum() * 0
    for s in data["sequence_ids"].unique().tolist():
        i = (active & (data["sequence_ids"] == s)).nonzero()[:, 0]
        if len(i) == 0:
            continue
        current, a = logprobs[i], data["advantages"][s].to(logprobs.dtype)
        loss = policy_terms(kind, current, old[i].to(current.dtype), a, o)
        loss = loss * factors(old[i], data["rollout_logprobs"][i], current.detach(), a, o).to(current.dtype)
        if o.get("kl_coef"):
            loss = loss + o["kl_coef"] * penalty(current, data["ref_logprobs"][i], (current - old[i]).exp(), o)
        loss = loss - o.get("entropy_coef", 0) * entropy[i]
        total = total + (loss.mean() if aggregation == "sequence" else loss.sum())
    return total / denominator


def ours(leaves, data, denominator, kind, o, **more):
    hidden, head, bias, targets = leaves
    options = PolicyLossOptions(**o)
    return linear_policy_loss(hidden, head, targets, bias=bias, temperature=0.8, denominator=denominator, kind=kind,
                              options=options, **data, **more)  # fmt: skip


def with_gradients(function, tensors, *arguments):
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in tensors]
    loss = function(leaves, *arguments)
    loss = getattr(loss, "loss", loss)
    loss.backward()
    return [loss.detach(), *(x.grad for x in leaves[:3])]


@pytest.mark.parametrize("on_policy", [False, True], ids=["old", "on_policy"])
@pytest.mark.parametrize(("kind", "name"), LEGAL)
def test_loss_and_gradients_in_float64(kind, name, on_policy):
    tensors, data = problem()
    if on_policy:
        data["old_logprobs"] = None
    o = {**BOUNDS[kind], **OPTIONS[name]}
    expected = with_gradients(truth, tensors, data, 3.7, kind, o)
    got = with_gradients(ours, tensors, data, 3.7, kind, o)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)
    assert got[1].any()


def test_the_problem_reaches_every_bound():
    tensors, data = problem()
    for kind, bounds in BOUNDS.items():
        dual = {} if kind in ("cispo", "cispo_max", "sapo") else {"dual_clip": 1.05 if "gspo" in kind else 1.4}
        metrics = ours(tensors, data, 1.0, kind, {**bounds, **dual}).metrics
        assert (metrics["clip_low"] > 0) == (kind not in ("cispo_max", "sapo")), kind
        assert (metrics["clip_high"] > 0) == (kind != "sapo"), kind
        if dual and "gspo" not in kind:
            assert metrics["clip_dual"] > 0
    for name in ("mis", "mis_sequence", "geometric", "k3_rejection", "off_policy"):
        metrics = ours(tensors, data, 1.0, "grpo", OPTIONS[name]).metrics
        assert 0 < metrics["dropped"] < metrics["tokens"], name
    for name in ("tis", "tis_sequence"):
        free = ours(tensors, data, 1.0, "grpo", {**OPTIONS[name], "correction_high": float("inf")}).metrics[
            "correction"
        ]
        assert 0 < ours(tensors, data, 1.0, "grpo", OPTIONS[name]).metrics["correction"] < free


@pytest.mark.parametrize("kind", ["grpo", "gspo", "sapo"])
def test_finite_differences(kind):
    """What has no stop-gradient: the value's own slope."""
    tensors, data = problem(lengths=(3, 2))
    o = {**BOUNDS[kind], "kl_coef": 0.7, "kl_gradient": "value", "entropy_coef": 0.1, **OPTIONS["tis"]}
    leaves = [x.requires_grad_() for x in tensors[:3]]
    assert torch.autograd.gradcheck(lambda *x: ours([*x, tensors[3]], data, 2.0, kind, o).loss, leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", list(BOUNDS))
def test_low_precision_is_no_worse_than_twice_plain_torch(kind, dtype):
    tensors, data = problem(dtype=dtype)
    o = {**BOUNDS[kind], "entropy_coef": 0.05}
    low = {n: x.to(dtype) if x.is_floating_point() else x for n, x in data.items()}
    exact = {n: x.double() if x.is_floating_point() else x for n, x in low.items()}
    doubles = [x.double() if x.is_floating_point() else x for x in tensors]
    expected = with_gradients(truth, doubles, exact, 3.0, kind, o)
    plain = with_gradients(truth, tensors, low, 3.0, kind, o)
    got = with_gradients(ours, tensors, low, 3.0, kind, o)
    for true, simple, x in zip(expected, plain, got, strict=True):
        ulp = torch.finfo(x.dtype).eps * true.abs().max()
        assert (x.double() - true).abs().max() <= 2 * (simple.double() - true).abs().max() + ulp


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["grpo", "gspo", "cispo", "sapo"])
def test_micro_batches_add_up(kind, dtype):
    """One batch of 16 sequences, 16 of one, and 4 of uneven sizes in another order."""
    lengths = (3, 1, 5, 2, 0, 4, 6, 1, 2, 7, 3, 3, 2, 5, 4, 1)
    tensors, data = problem(lengths, dtype=dtype)
    data = {n: x.to(dtype) if x.is_floating_point() else x for n, x in data.items()}
    o = {**BOUNDS[kind], **OPTIONS["all"], "aggregation": "sequence"}
    rewards = torch.rand(16, generator=torch.Generator().manual_seed(1)).to(dtype)
    data["advantages"] = (rewards, torch.tensor([0, 4, 16], dtype=torch.int32))
    cuts = [[range(16)], [[s] for s in range(16)], [[9, 2], [0, 15, 4, 3, 1], [5, 6, 7, 8, 10], [11, 12, 13, 14]]]
    results = []
    for cut in cuts:
        leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in tensors]
        losses, metrics = [], []
        for part in cut:
            rows = torch.cat([(data["sequence_ids"] == s).nonzero()[:, 0] for s in part])
            picked = {n: x[rows] if isinstance(x, torch.Tensor) else x for n, x in data.items()}
            out = ours([leaves[0][rows], leaves[1], leaves[2], leaves[3][rows]], picked, 16.0, kind, o)
            out.loss.backward()
            losses.append(out.loss.detach())
            metrics.append(out.metrics)
        total = mean_metrics(add_metrics(metrics))
        results.append(
            [torch.stack(losses).sum(), *(x.grad for x in leaves[:3]), torch.stack([*total.values()]).to(dtype)]
        )
    tolerance = {"rtol": 1e-12, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    for other in results[1:]:
        for x, y in zip(other, results[0], strict=True):
            torch.testing.assert_close(x, y, **tolerance)


def test_rewards_become_the_advantages_of_the_kind():
    tensors, data = problem()
    rewards, offsets = torch.rand(6).double(), torch.tensor([0, 3, 6], dtype=torch.int32)
    for kind, normalised in (("grpo", "grpo"), ("dr_grpo", "dr_grpo")):
        o = BOUNDS[kind]
        given = {**data, "advantages": group_advantage(rewards, offsets, kind=normalised).double()}
        asked = {**data, "advantages": (rewards, offsets)}
        assert torch.equal(ours(tensors, asked, 2.0, kind, o).loss, ours(tensors, given, 2.0, kind, o).loss)
    same = {**data, "advantages": (torch.full((6,), 0.7), offsets)}
    results = with_gradients(ours, tensors, same, 2.0, "grpo", CLIPS)
    assert all(not x.any() for x in results)


def test_a_nan_reward_shows_in_the_loss_of_its_group():
    tensors, data = problem()
    offsets = torch.tensor([0, 3, 6], dtype=torch.int32)
    rewards = torch.tensor([0.1, float("nan"), 0.3, 0.4, 0.5, 0.7])
    data["advantages"] = (rewards, offsets)
    drops = {"mis", "mis_sequence", "geometric", "k3_rejection", "all"}  # and with it, perhaps, the group
    for kind, name in ((kind, name) for kind, name in LEGAL if name not in drops):
        assert ours(tensors, data, 2.0, kind, {**BOUNDS[kind], **OPTIONS[name]}).loss.isnan(), (kind, name)
    data["mask"] &= data["sequence_ids"] >= 3
    assert ours(tensors, data, 2.0, "grpo", CLIPS).loss.isfinite()


def test_a_missing_behaviour_logprob_shows_too():
    tensors, data = problem()
    data["mask"][:] = True
    data["rollout_logprobs"][11] = float("nan")
    for name in ("tis", "tis_sequence", "mis", "mis_sequence", "geometric", "k3_rejection", "off_policy"):
        assert ours(tensors, data, 2.0, "grpo", OPTIONS[name]).loss.isnan(), name
    assert ours(tensors, data, 2.0, "grpo", {}).loss.isfinite()


@pytest.mark.parametrize("kind", list(BOUNDS))
@pytest.mark.parametrize("lengths", [(0,), (1,), (0, 1, 0), ()], ids=str)
def test_no_token_and_one_token(kind, lengths):
    tensors, data = problem(lengths)
    data["mask"][:] = True
    o = {**BOUNDS[kind], **OPTIONS["all"]}
    expected = with_gradients(truth, tensors, data, 1.0, kind, o)
    got = with_gradients(ours, tensors, data, 1.0, kind, o)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", list(BOUNDS))
def test_masked_tokens_are_never_read(kind):
    tensors, data = problem()
    o = {**BOUNDS[kind], **OPTIONS["all"]}
    expected = with_gradients(ours, tensors, data, 2.0, kind, o)
    for name in ("old_logprobs", "rollout_logprobs", "ref_logprobs"):
        data[name] = data[name].masked_fill(~data["mask"], float("nan"))
    got = with_gradients(ours, tensors, data, 2.0, kind, o)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    data["mask"][:] = False
    assert all(not x.any() for x in with_gradients(ours, tensors, data, 2.0, kind, o))


def test_no_tensor_of_tokens_by_vocabulary(monkeypatch):
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return out

    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 3 * VOCAB)
    tensors, data = problem(lengths=(40, 50, 60), dtype=torch.float32)
    with Largest() as seen:
        with_gradients(ours, tensors, data, 2.0, "gspo", {**BOUNDS["gspo"], **OPTIONS["all"]})
    assert seen.elements <= 150 * WIDTH < 150 * VOCAB


def test_the_logprobs_of_this_pass_are_the_old_ones_of_the_next():
    tensors, data = problem()
    data["old_logprobs"] = None
    first = ours(tensors, data, 2.0, "grpo", CLIPS)
    expected = materialised(*tensors, temperature=0.8)[0].masked_fill(tensors[3] == -100, 0.0)
    torch.testing.assert_close(first.logprobs, expected, rtol=1e-12, atol=1e-13)
    assert not first.logprobs.requires_grad
    data["old_logprobs"] = first.logprobs
    assert torch.equal(ours(tensors, data, 2.0, "grpo", CLIPS).loss, first.loss)
