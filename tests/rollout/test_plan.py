"""The model of memory and time against bytes that torch really holds, and against arithmetic by hand."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from foveate.kernels.policy_loss import triton_logits
from foveate.rollout import cli, models
from foveate.rollout.batch import Batch
from foveate.rollout.config import EngineConfig, SamplingParams
from foveate.rollout.engine import Engine
from foveate.rollout.grpo import GRPOConfig
from foveate.rollout.learner import Learner
from foveate.rollout.policy import predict
from foveate.rollout.prefix_groups import Packer, Sample, row_inputs
from foveate.rollout.testing import tiny_model
from foveate.rollout.tools import plan, plan_command
from foveate.rollout.tools.plan import GPU, Rows, Workload, kv_bytes, layer_token, memory, times
from foveate.rollout.tools.sizes import SHAPES, Sizes, TowerSizes, sizes_of
from foveate.rollout.types import Request, Rollout, RolloutGroup


def make_group(prompt: int, completion: int, n: int) -> RolloutGroup:
    ids, zeros = torch.arange(prompt) % 256, torch.zeros(completion)
    rollouts = (Rollout(torch.arange(completion) % 256, zeros, zeros, zeros, "length"),) * n
    positions = torch.arange(prompt, dtype=torch.int32).expand(3, -1)
    return RolloutGroup(Request(ids, n=n), "p", ids, positions, prompt, torch.tensor([prompt]).int(), rollouts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "tied"), [("qwen3", False), ("llama", True), ("qwen2_5_vl", False)])
def test_weights_gradients_and_optimiser_are_what_a_run_holds(family, tied, dtype):
    model = tiny_model(family, dtype=dtype, tie_word_embeddings=tied)
    group = make_group(5, 3, 2)
    samples = [Sample(group, rollout) for rollout in group.rollouts]
    learner = Learner(model, None, GRPOConfig())
    learner.update(Batch(samples, torch.ones(2), torch.ones(2, dtype=torch.bool), 4.0), 1e-3)
    if family == "qwen2_5_vl":  # the tower had no image and no gradient
        for parameter in model.model.visual.parameters():
            parameter.grad = torch.zeros_like(parameter)
        learner.optimizer.step()
    held = memory(Sizes.of(model), Workload(itemsize=dtype.itemsize))
    parameters = list(model.parameters())
    assert held["weights"] == sum(p.nbytes for p in parameters)
    assert held["gradients"] == sum(p.grad.nbytes for p in parameters)
    states = [value for state in learner.optimizer.state.values() for value in state.values()]
    assert held["optimiser"] == sum(value.nbytes for value in states)
    assert "reference" not in held
    assert memory(Sizes.of(model), Workload(itemsize=dtype.itemsize, reference=True))["reference"] == held["weights"]


@pytest.mark.parametrize(("prompt", "completion"), [(40, 20), (32, 16), (33, 52), (16, 17)])
def test_the_cache_is_what_an_engine_fills(prompt, completion):
    """Two prompts of three samples, to the page; a completion's last token is read by nothing and not stored."""
    model = tiny_model("qwen3")
    engine = Engine(model, config=EngineConfig(page_size=16, kv_memory=4 << 20))
    sampling = SamplingParams(max_tokens=completion, ignore_eos=True)
    for place in range(2):
        ids = [(7 * place + 11 * index + 1) % 256 for index in range(prompt)]
        engine.add_request(Request(ids, n=3, sampling=sampling, prefix_len=0))
    most = 0
    while engine.has_unfinished:
        engine.step()
        most = max(most, engine.memory_report()["kv_used"])
    work = Workload(prompts=2, n=3, prompt=prompt, completion=completion, page=16, itemsize=4)
    assert kv_bytes(Sizes.of(model), work) == most


def test_only_samples_that_run_have_a_cache():
    work = Workload(prompts=10, n=4, prompt=16, completion=16, page=16, sequences=8)
    sizes = Sizes.of(tiny_model("qwen3"))
    assert (
        kv_bytes(sizes, work) == kv_bytes(sizes, replace(work, prompts=2)) < kv_bytes(sizes, replace(work, sequences=9))
    )


def kept_bytes(model: torch.nn.Module, run: Callable[[], object]) -> int:
    """Of the storages that autograd keeps, parameters excluded."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        held.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    del result
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in held.items() if pointer not in own)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen2_5_vl", "qwen3_vl"])
def test_what_a_decoder_layer_keeps(family, dtype, checkpointing):
    """What a third and a fourth layer add, to the byte."""
    group = make_group(61, 30, 4)
    samples, kept = [Sample(group, rollout) for rollout in group.rollouts], []
    for layers in (2, 3, 4):
        model = tiny_model(family, dtype=dtype, num_hidden_layers=layers)
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
            model.train()
        spec = models.describe(model)
        kept.append(kept_bytes(model, lambda spec=spec: predict(spec, samples, Packer(1e9))))
    sizes, tokens = Sizes.of(model), row_inputs(samples)
    assert tokens == 61 + 4 * 29
    token = sizes.hidden * dtype.itemsize if checkpointing else layer_token(sizes, dtype.itemsize)
    assert [second - first for first, second in pairwise(kept)] == [tokens * token] * 2


def test_activations_of_a_micro_batch():
    sizes = Sizes.of(tiny_model("qwen2"))
    work = Workload(prompts=4, n=3, prompt=20, completion=5, itemsize=4, micro_batch=70, images=0, checkpointing=False)
    assert Rows.of(sizes, work) == Rows(samples=3, tokens=32, per_group=1)
    two_rows = 2 * 32
    whole = plan.decoder_activations(sizes, work)
    assert whole == two_rows * (2 * layer_token(sizes, 4) + 32 * 4)  # and the mask
    checkpointed = plan.decoder_activations(sizes, replace(work, checkpointing=True))
    assert checkpointed == two_rows * (2 * 48 * 4 + layer_token(sizes, 4) + 32 * 4)
    alone = plan.decoder_activations(sizes, replace(work, grouped=False))
    assert alone == 2 * 24 * 2 * layer_token(sizes, 4)  # two rows of 24 tokens fit


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize(("prompt", "completion", "n"), [(20, 5, 3), (20, 40, 7), (3, 30, 4), (9, 1, 2), (60, 100, 1)])
def test_rows_are_the_trainers(prompt, completion, n, grouped):
    model = tiny_model("qwen2")
    group = make_group(prompt, completion, n)
    rows = Packer.of(models.describe(model), grouped).rows([Sample(group, rollout) for rollout in group.rollouts])
    work = Workload(prompts=5, n=n, prompt=prompt, completion=completion, grouped=grouped)
    found = Rows.of(Sizes.of(model), work)
    assert found.per_group == len(rows)
    assert found.tokens == max(map(row_inputs, rows))
    assert found.forwarded(work) == 5 * sum(map(row_inputs, rows))


def test_pairs_of_tokens_by_hand():
    sizes = Sizes.of(tiny_model("qwen2"))
    work = Workload(prompts=1, n=2, prompt=3, completion=3)
    rows = Rows.of(sizes, work)
    assert rows.attended(work) == (1 + 2 + 3) + 2 * (4 + 5)
    assert rows.forwarded(work) == 3 + 2 * 2
    alone = replace(work, grouped=False)
    assert Rows.of(sizes, alone).attended(alone) == 2 * (1 + 2 + 3 + 4 + 5)


def test_named_shapes_have_the_published_number_of_parameters():
    """In a process of its own: here `torch.empty` is one that "meta" does not know, and would take the memory."""
    code = "from foveate.rollout.tools.sizes import *; print([sizes_of(name).parameters for name in SHAPES])"
    ended = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert list(SHAPES) == ["Qwen2.5-VL-3B", "Qwen2.5-VL-7B", "Qwen2.5-VL-32B"]
    assert ended.stdout.strip() == "[3754622976, 8292166656, 33452718336]"


@pytest.mark.parametrize("family", ["qwen3", "qwen2_vl", "qwen3_vl"])
def test_a_saved_model_is_read_without_its_weights(family, tmp_path):
    model = tiny_model(family)
    model.config.save_pretrained(tmp_path)
    assert sizes_of(str(tmp_path)) == Sizes.of(model)
    tower = {"qwen2_vl": TowerSizes(2, 32, 64, 0, 4, 0), "qwen3_vl": TowerSizes(2, 32, 48, 0, 4, 2)}.get(family)
    found = Sizes.of(model).tower
    assert (found and replace(found, parameters=0)) == tower


# Time

TINY = Sizes(
    parameters=1000, tensors=3, layers_parameters=600, layers=2, hidden=10, heads=2, kv_heads=1, head_dim=5,
    intermediate=20, vocab=30,
)  # fmt: skip
STEP = Workload(prompts=2, n=2, prompt=8, completion=4, images=0, prefill=8, sequences=4, checkpointing=False)


def test_bandwidth_alone():
    """Bytes over 1 byte/s; products cost nothing."""
    found = times(TINY, STEP, GPU(0, 1.0, math.inf))
    assert found["prefill"] == 2 * 600 * 2  # two steps of 8 tokens read the layers
    token = 2 * 2 * 1 * 5 * 2
    cached = [2 * 8 + 4 * step for step in (1, 2, 3, 4)]  # both prompts once, four samples' own
    assert found["decode"] == 4 * (600 + 30 * 10) * 2 + sum(cached) * token
    assert found["update"] == 0
    assert found["optimiser"] == 7 * 1000 * 2


def test_products_alone():
    """Operations at 1 a second."""
    found = times(TINY, STEP, GPU(0, math.inf, 1.0))
    pair = 4 * 10 * 2  # two products of 10, a multiply-add each, in two layers
    assert found["prefill"] == 2 * 600 * 16 + 2 * 36 * pair
    assert found["decode"] == 2 * 900 * 16 + 4 * (9 + 10 + 11 + 12) * pair
    forward = 2 * 600 * (2 * 8 + 4 * 3) + (2 * 36 + 4 * (9 + 10 + 11)) * pair
    loss = 8 * 300 * 16
    assert found["update"] == 3 * forward + loss
    assert times(TINY, replace(STEP, checkpointing=True), GPU(0, math.inf, 1.0))["update"] == 4 * forward + loss
    assert found["optimiser"] == 0


def test_waves_follow_each_other():
    gpu = GPU(0, 1.0, 1.0)
    assert (
        times(TINY, replace(STEP, sequences=2), gpu)["decode"]
        == 2 * times(TINY, replace(STEP, prompts=1), gpu)["decode"]
    )


def test_images_cost_the_tower():
    sizes = replace(TINY, tower=TowerSizes(depth=3, width=4, intermediate=8, parameters=50, merge=4, deepstack=1))
    work, gpu = replace(STEP, images=2, patches=12), GPU(0, math.inf, 1.0)
    more = times(sizes, work, gpu)["prefill"] - times(TINY, work, gpu)["prefill"]
    assert more == 4 * (2 * 50 * 12 + 4 * 4 * 3 * 12 * 12)
    assert memory(sizes, work)["image features"] == 4 * 3 * 10 * 2 * 2
    assert plan.tower_activations(sizes, work) > plan.tower_activations(sizes, replace(work, images=0)) == 0


# The command

LARGE = Sizes(
    parameters=3_754_622_976, tensors=824, layers_parameters=2_774_771_712, layers=36, hidden=2048, heads=16,
    kv_heads=2, head_dim=128, intermediate=11008, vocab=151936,
    tower=TowerSizes(depth=32, width=1280, intermediate=3420, parameters=668_684_288, merge=4, deepstack=0),
)  # fmt: skip


@pytest.fixture
def large(monkeypatch):
    """Without building the model."""
    monkeypatch.setattr(plan_command, "sizes_of", lambda name: LARGE)


def test_the_command_says_what_fits(capsys, large):
    assert cli.main(["doctor", "--plan", "--completion", "8192", "--sequences", "256"]) == 0
    printed = capsys.readouterr().out
    assert "does not fit" in printed
    assert "fits" in printed
    assert "vendor's figures" in printed
    assert "measured" in printed


def test_json_and_a_gpu_of_ones_own(capsys, large):
    own = ["--gpu-memory", "24", "--gpu-bandwidth", "1", "--gpu-rate", "165"]
    assert cli.main(["doctor", "--plan", "--json", "--no-optimizer", "--prompts", "2", *own]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"]["weights"] == 2 * 3_754_622_976
    assert set(found["bytes"]) == {"weights", "KV cache", "image features"}
    assert found["gpus"]["yours"]["fits"] is True
    assert set(found["gpus"]["yours"]["seconds"]) == {"prefill", "decode"}
    assert set(found["gpus"]) == {*plan.GPUS, "yours"}


def test_without_rich(capsys, monkeypatch, large):
    monkeypatch.setattr(plan_command, "find_spec", lambda name: None)
    assert cli.main(["doctor", "--plan", "--prompt", "4096"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (weights,) = (line.split() for line in lines if line.startswith("weights"))
    assert weights == ["weights", "6.99", "6.99"]


@pytest.mark.parametrize(
    ("words", "message"), [(["--n", "0"], "(n)"), (["--gpu-memory", "24"], "together"), (["--m", "GPT"], "--m")]
)
def test_wrong_options_are_named(words, message, capsys, large):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["doctor", "--plan", *words])
    assert message in capsys.readouterr().err


def test_an_unknown_model_is_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["doctor", "--plan", "--model", "GPT"])
    assert "'GPT' (--model)" in capsys.readouterr().err


def test_the_loss_workspace_is_that_of_the_kernel():
    """The kernel's own buffers, unless the gradient of the LM head in its own dtype is larger."""
    assert (plan.CHUNK_BYTES, plan.CHUNK_PARTS) == (triton_logits.CHUNK_BYTES, triton_logits.PARTS)
    sizes = sizes_of("Qwen2.5-VL-3B")
    for completion, larger in ((64, "head"), (2048, "chunk"), (1 << 14, "chunk")):
        work = Workload(micro_batch=4, prompt=64, completion=completion)
        tokens = Rows.of(sizes, work).micro_batch(work)
        hidden = torch.empty(tokens, 1, dtype=torch.bfloat16, device="meta")
        buffers = triton_logits._Buffers.of(hidden, sizes.vocab)
        held = buffers.logits.nbytes + buffers.gradients.nbytes
        head = sizes.vocab * sizes.hidden
        assert (held > 2 * head) == (larger == "chunk"), (held, head)
        workspace = memory(sizes, work)["loss workspace"]
        expected = 8 * tokens * sizes.hidden + 4 * head + max(held, 2 * head)
        # The kernel's blocks are whole steps of tokens.
        step = triton_logits.STEP * sizes.vocab * 3
        assert expected <= workspace <= expected + (step if tokens > buffers.part else 0)
