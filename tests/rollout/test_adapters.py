"""Projections that are no plain linear: LoRA against `peft`'s own forward, types that a user registers, refusals."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from foveate.rollout.config import SamplingParams
from foveate.rollout.grpo import GRPOConfig
from foveate.rollout.learner import Learner
from foveate.rollout.models import adapters, describe, register_adapter
from foveate.rollout.policy import Sample, policy_logprobs
from foveate.rollout.testing import tiny_model
from foveate.rollout.types import Request

pytestmark = pytest.mark.filterwarnings("ignore")
EVERY_PROJECTION = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS = {
    "all": ("qwen2", {"target_modules": EVERY_PROJECTION}),
    "q and v": ("qwen2", {"target_modules": ["q_proj", "v_proj"]}),
    "one layer": ("llama", {"target_modules": ["up_proj", "o_proj"], "layers_to_transform": [1]}),
    "rank-stabilised": ("qwen3", {"target_modules": EVERY_PROJECTION, "use_rslora": True, "r": 8}),
    "bias": ("qwen2", {"target_modules": EVERY_PROJECTION, "lora_bias": True}),
    "vision tower too": ("qwen2_5_vl", {"target_modules": [*EVERY_PROJECTION, "qkv", "proj"]}),
    "deepstack": ("qwen3_vl", {"target_modules": EVERY_PROJECTION}),
}


def lora(model: nn.Module, **fields):
    """A LoRA model with random A and B; the model's own projections are wrapped in place."""
    peft = pytest.importorskip("peft")
    fields = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "target_modules": ["q_proj"]} | fields
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**fields)).eval()
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                nn.init.normal_(parameter, std=0.5)
    return wrapped


@pytest.fixture
def requests(chat, picture):
    """(model) -> a text prompt and, for a vision-language model, one with an image."""

    def make(model) -> list[Request]:
        sampling = {"max_tokens": 10, "seed": 2}
        made = [Request("Plain text.", n=2, sampling=SamplingParams(**sampling))]
        return made + (
            [chat("What is it?", [picture(56, 84)], **sampling)] if hasattr(model.config, "vision_config") else []
        )

    return make


def logprobs(engine, requests) -> torch.Tensor:
    groups = engine.generate(requests, strict=True)
    return torch.cat([rollout.logprobs for group in groups for rollout in group.rollouts])


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_pefts_own_forward(name, make_engine, requests, assert_logprobs):
    family, fields = CONFIGS[name]
    model = tiny_model(family, seed=4)
    plain = logprobs(make_engine(model), requests(model))
    wrapped = lora(model, **fields)
    engine = make_engine(wrapped)
    assert not engine.shares_weights
    groups = engine.generate(requests(model), strict=True)
    assert_logprobs(model, groups)
    assert not torch.allclose(torch.cat([r.logprobs for g in groups for r in g.rollouts]), plain, atol=1e-2)


@pytest.mark.parametrize("which", ["lora_A", "lora_B", "base_layer"])
def test_update_weights_makes_a_change_count(which, make_engine, requests, assert_logprobs):
    model = tiny_model("qwen2", seed=4)
    engine = make_engine(lora(model, target_modules=EVERY_PROJECTION))
    before = logprobs(engine, requests(model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if which in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    assert torch.equal(logprobs(engine, requests(model)), before)
    engine.update_weights()
    groups = engine.generate(requests(model), strict=True)
    assert_logprobs(model, groups)
    assert not torch.allclose(torch.cat([r.logprobs for g in groups for r in g.rollouts]), before, atol=1e-2)


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_named_updates(prefix, make_engine, requests):
    model, source = tiny_model("qwen2", seed=4), tiny_model("qwen2", seed=5)
    engine, expected = make_engine(lora(model)), make_engine(lora(source, lora_alpha=6))
    engine.update_weights({f"{prefix}{name}": value for name, value in source.named_parameters()})
    assert torch.equal(logprobs(engine, requests(model)), logprobs(expected, requests(model)))
    with pytest.raises(ValueError, match=r"expected the name of a parameter of the model, got 'lora_C'"):
        engine.update_weights({"lora_C": torch.zeros(1)}, partial=True)


def test_adapters_of_a_model_in_other_states(make_engine, requests, assert_logprobs):
    """Two adapters at once, another one alone, merged, unmerged, disabled: each after `update_weights()`."""
    peft = pytest.importorskip("peft")
    model = tiny_model("qwen2", seed=4)
    plain = logprobs(make_engine(model), requests(model))
    wrapped = lora(model)
    wrapped.add_adapter(
        "second", peft.LoraConfig(r=2, lora_alpha=7, init_lora_weights=False, target_modules=["q_proj", "o_proj"])
    )
    engine = make_engine(wrapped)
    seen = []

    def check() -> None:
        engine.update_weights()
        groups = engine.generate(requests(model), strict=True)
        assert_logprobs(model, groups)
        seen.append(torch.cat([rollout.logprobs for group in groups for rollout in group.rollouts]))

    check()
    wrapped.set_adapter("second")
    check()
    wrapped.base_model.set_adapter(["default", "second"])
    check()
    wrapped.base_model.merge_adapter()
    check()
    torch.testing.assert_close(seen[3], seen[2], atol=1e-4, rtol=0)
    wrapped.base_model.unmerge_adapter()
    with wrapped.disable_adapter():
        check()
    torch.testing.assert_close(seen[4], plain, atol=1e-4, rtol=0)
    assert all(not torch.allclose(a, b, atol=1e-2) for a, b in pairwise(seen[:3]))


def test_a_model_that_is_wrapped_later(make_engine, requests, assert_logprobs):
    model = tiny_model("qwen2", seed=4)
    engine = make_engine(model)
    assert engine.shares_weights
    lora(model)
    assert_logprobs(model, engine.generate(requests(model), strict=True))
    assert not engine.shares_weights


def _moved_embedding(model) -> None:
    model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.detach().clone()


def _requires_input_grads(model) -> None:
    model.enable_input_require_grads()


@pytest.mark.parametrize("dtype", [None, torch.float64])
@pytest.mark.parametrize("cause", [_moved_embedding, _requires_input_grads])
def test_copies_are_renewed_by_an_update_alone(cause, dtype, make_engine, requests, monkeypatch):
    """Whatever else makes the engine read the model again."""
    model = tiny_model("llama", seed=4)
    engine = make_engine(lora(model, target_modules=EVERY_PROJECTION), dtype=dtype)
    before = logprobs(engine, requests(model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-3)
    reads = []
    original = engine._weights.adopt
    monkeypatch.setattr(engine._weights, "adopt", lambda: reads.append(original()))
    cause(model)
    assert torch.equal(logprobs(engine, requests(model)), before)
    assert len(reads) == 1
    engine.update_weights()
    assert not torch.allclose(logprobs(engine, requests(model)), before, atol=1e-2)


@pytest.mark.parametrize("how", ["parameter", "data", "module"])
def test_only_the_copy_of_what_was_replaced_is_renewed(how, make_engine, requests):
    model = tiny_model("llama", seed=4)
    engine = make_engine(lora(model, target_modules=["o_proj"]))
    copies = [layer.o[0] for layer in engine._weights.layers]
    before = copies[1].clone()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-3)
    factors = model.model.layers[0].self_attn.o_proj.lora_B
    changed = factors["default"].weight.detach().clone()
    if how == "parameter":
        factors["default"].weight = nn.Parameter(changed)
    elif how == "data":
        factors["default"].weight.data = changed
    else:
        weight = factors["default"].weight  # the same parameter in another module
        factors["default"] = nn.Linear(*changed.shape[::-1], bias=False)
        factors["default"].weight = weight
    logprobs(engine, requests(model))
    layer = model.model.layers[0].self_attn.o_proj
    expected = layer.base_layer.weight + layer.get_delta_weight("default")
    torch.testing.assert_close(engine._weights.layers[0].o[0], expected.detach())
    assert engine._weights.layers[1].o[0] is copies[1]
    assert torch.equal(copies[1], before)


def test_parameters_stay_the_models_and_bytes_are_counted(make_engine):
    model = tiny_model("llama")
    wrapped = lora(model, target_modules=["o_proj"])
    before = {name: parameter.detach().clone() for name, parameter in wrapped.named_parameters()}
    engine = make_engine(wrapped)
    assert {name: torch.equal(p, before[name]) for name, p in wrapped.named_parameters()} == dict.fromkeys(before, True)
    weights = [layer.self_attn.o_proj.base_layer.weight for layer in model.model.layers]
    assert engine.memory_report()["shadow_weights"] == sum(weight.nbytes for weight in weights)
    pointers = {copy.data_ptr() for copy, _ in (layer.o for layer in engine._weights.layers)}
    assert not pointers & {weight.data_ptr() for weight in weights}
    plain = sum(p.nbytes for name, p in before.items() if "o_proj" not in name)
    assert engine.memory_report()["shared_weights"] == plain


def test_another_dtype(make_engine, requests):
    """A bfloat16 engine rounds the product once, not its factors."""
    model = tiny_model("llama")
    engine = make_engine(lora(model, target_modules=["o_proj"]), dtype=torch.bfloat16)
    layer = model.model.layers[0].self_attn.o_proj
    product = layer.lora_B.default.weight @ layer.lora_A.default.weight
    expected = layer.base_layer.weight + layer.scaling["default"] * product
    assert torch.equal(engine._weights.layers[0].o[0], expected.bfloat16())
    assert logprobs(engine, requests(model)).isfinite().all()


def test_the_trainers_forward_and_gradients(make_engine, requests):
    model = tiny_model("qwen3_vl", seed=4)
    wrapped = lora(model, target_modules=EVERY_PROJECTION)
    groups = make_engine(wrapped).generate(requests(model), strict=True)
    samples = [Sample(group, rollout) for group in groups for rollout in group.rollouts]
    drawn = policy_logprobs(describe(wrapped), samples).logprobs
    torch.testing.assert_close(drawn, torch.cat([s.rollout.logprobs for s in samples]), atol=5e-5, rtol=0)
    factors = {name: p for name, p in wrapped.named_parameters() if "lora_" in name and "language_model" in name}
    assert factors
    for name, grad in zip(factors, torch.autograd.grad(drawn.sum(), factors.values()), strict=True):
        assert grad.abs().max() > 1e-5, name


def test_dropout_of_adapters_is_for_training_alone(make_engine, requests, assert_logprobs):
    """In training mode too, on the decoder and on the tower; a trainer that would train with it is refused."""
    model = tiny_model("qwen2_5_vl", seed=4)
    wrapped = lora(model, target_modules=[*EVERY_PROJECTION, "qkv", "proj"], lora_dropout=0.5)
    engine = make_engine(wrapped)
    wrapped.train()
    modes = [module.training for module in wrapped.modules()]
    groups = engine.generate(requests(model), strict=True)
    assert [module.training for module in wrapped.modules()] == modes
    with pytest.raises(ValueError, match=r"expected no dropout, got 0.5 \(.*lora_dropout.default\)"):
        Learner(wrapped, None, GRPOConfig())
    wrapped.eval()
    assert_logprobs(model, groups)


REFUSED = {
    "dora": ({"use_dora": True}, r"expected plain LoRA, got DoraLinearVariant \(default\) \(model.*q_proj\)"),
    "head": ({"target_modules": ["lm_head"]}, r"expected a plain torch.nn.Linear, got Linear \(lm_head\)"),
    "embedding": (
        {"target_modules": ["embed_tokens"]},
        r"nn.Embedding, got peft.*Embedding \(model.embed_tokens\)",
    ),
    "saved head": ({"modules_to_save": ["lm_head"]}, r"got ModulesToSaveWrapper \(lm_head\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_plain_lora_is_refused_by_name(name, make_engine):
    fields, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        make_engine(lora(tiny_model("llama"), **fields))


@pytest.mark.parametrize("child", ["", ".base_layer", ".lora_A.default", ".lora_B.default"])
def test_hooks_are_refused_also_later(child, make_engine, requests):
    model = tiny_model("llama")
    engine = make_engine(lora(model))
    module = model.get_submodule(f"model.layers.0.self_attn.q_proj{child}")
    handle = module.register_forward_hook(lambda module, args, output: output + 1)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"without forward hooks, got one with hooks \(model.layers.0.self_attn.q"):
            engine.generate(requests(model))
    handle.remove()
    assert all(group.error is None for group in engine.generate(requests(model)))


def test_other_models_of_peft_are_refused(make_engine):
    """Prompt tuning leaves every projection as it is, and changes what the model computes."""
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(
        tiny_model("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    with pytest.raises(ValueError, match=r"expected LoRA, got .*LlamaForCausalLM \(model\)"):
        make_engine(wrapped)
    wrapped = peft.get_peft_model(
        tiny_model("llama"), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    )
    with pytest.raises(ValueError, match=r"expected LoRA, got peft.tuners.ia3.model.IA3Model \(model\)"):
        make_engine(wrapped)


class Doubled(nn.Module):
    """x -> 2 x W^T + 1, a type that nobody knows."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base

    def forward(self, x):
        return 2 * self.base(x) + 1


def _doubled(module: Doubled):
    if module.base.bias is not None:
        raise ValueError("expected no bias, got one")
    return 2 * module.base.weight, torch.ones(module.base.out_features)


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(adapters, "_REGISTERED", {})


@pytest.mark.parametrize("name", ["q_proj", "o_proj"])
def test_a_registered_type(name, registry, make_engine, requests, assert_logprobs):
    model = tiny_model("llama")
    for layer in model.model.layers:
        setattr(layer.self_attn, name, Doubled(getattr(layer.self_attn, name)))
    with pytest.raises(ValueError, match=rf"got .*Doubled \(model.layers.0.self_attn.{name}\)"):
        make_engine(model)
    register_adapter(Doubled, _doubled)
    engine = make_engine(model)
    assert_logprobs(model, engine.generate(requests(model), strict=True))
    moved = getattr(model.model.layers[0].self_attn, name).base
    moved.weight = nn.Parameter(moved.weight.detach() * 0.5)  # seen without update_weights, as any parameter that moves
    assert_logprobs(model, engine.generate(requests(model), strict=True))


def test_what_a_registered_function_refuses_is_named(registry, make_engine):
    register_adapter(Doubled, _doubled)
    model = tiny_model("qwen2")
    attention = model.model.layers[1].self_attn
    attention.v_proj = Doubled(attention.v_proj)
    with pytest.raises(ValueError, match=r"expected no bias, got one \(model.layers.1.self_attn.v_proj\)"):
        make_engine(model)


def test_a_subclass_is_another_type(registry, make_engine):
    register_adapter(Doubled, _doubled)
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    attention.v_proj = type("Other", (Doubled,), {})(attention.v_proj)
    with pytest.raises(ValueError, match=r"got .*Other \(model.layers.1.self_attn.v_proj\)"):
        make_engine(model)


@pytest.mark.parametrize("kind", [torch.Tensor, "Linear", nn.Linear(1, 1)])
def test_what_is_no_module_type_cannot_be_registered(kind, registry):
    with pytest.raises(ValueError, match=r"expected a subclass of torch.nn.Module, got"):
        register_adapter(kind, _doubled)
