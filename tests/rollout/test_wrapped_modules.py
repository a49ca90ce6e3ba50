"""Modules of the decoder whose forward is not transformers' own: refused by name, when an engine is made and later."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from foveate.rollout.config import SamplingParams
from foveate.rollout.models import llama, watch
from foveate.rollout.testing import FAMILIES, tiny_model
from foveate.rollout.types import Request

GREEDY = [Request([1] * 5, sampling=SamplingParams(max_tokens=4, temperature=0, ignore_eos=True, seed=1))]
PARTS = [
    "",
    ".embed_tokens",
    ".rotary_emb",
    ".norm",
    ".layers",
    ".layers.1",
    ".layers.1.input_layernorm",
    ".layers.1.post_attention_layernorm",
    ".layers.1.self_attn",
    ".layers.0.mlp",
    ".layers.0.mlp.act_fn",
]


def decoder_name(model: nn.Module) -> str:
    return "model.language_model" if hasattr(model.model, "language_model") else "model"


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, child = name.rpartition(".")
    setattr(model.get_submodule(owner), child, module)


class Outer(nn.Module):
    """A wrapper that hands on every attribute, as those of torch do."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def _subclass(model, name):
    """As `fully_shard` does it."""
    module = model.get_submodule(name)
    module.__class__ = type(f"FSDP{type(module).__name__}", (type(module),), {})


def _wrap(model, name):
    put(model, name, Outer(model.get_submodule(name)))


def _compile(model, name):
    put(model, name, torch.compile(model.get_submodule(name)))


def _compile_in_place(model, name):
    model.get_submodule(name).compile()


def _hook(model, name):
    model.get_submodule(name).register_forward_hook(lambda module, args, output: output)


def _pre_hook(model, name):
    model.get_submodule(name).register_forward_pre_hook(lambda module, args: None)


def _set_forward(model, name):
    module = model.get_submodule(name)
    module.forward = module.forward


CHANGES = {
    "subclass": (_subclass, "got .*FSDP"),
    "wrapper": (_wrap, "got .*Outer"),
    "compiled": (_compile, "got .*OptimizedModule"),
    "compiled in place": (_compile_in_place, "not compiled, got one that is"),
    "hook": (_hook, "without forward hooks, got one with hooks"),
    "pre-hook": (_pre_hook, "without forward hooks, got one with hooks"),
    "forward": (_set_forward, "with the forward of its class, got one with its own"),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("change", CHANGES)
def test_refused_by_name(change, part, make_engine):
    """In a new engine, and by one that was made before; a refusal is no adoption, and what is undone is forgotten."""
    model = tiny_model("qwen3")
    engine = make_engine(model)
    expected = engine.generate(GREEDY, strict=True)
    name = f"model{part}"
    make, message = CHANGES[change]
    module = model.get_submodule(name)
    before = type(module), dict(module.__dict__)
    make(model, name)
    is_replaced = part == "" and change in ("wrapper", "compiled")
    later = "expected the decoder that the engine was built with, got another one" if is_replaced else message
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"{later}.*\({name}\)"):
            engine.generate(GREEDY)
    with pytest.raises(ValueError, match=rf"{message}.*\({name}\)"):
        make_engine(model)
    put(model, f"model{part}", module)
    module.__class__ = before[0]
    module.__dict__.pop("forward", None)
    module.__dict__.pop("_compiled_call_impl", None)
    module._forward_hooks.clear()
    module._forward_pre_hooks.clear()
    (group,) = engine.generate(GREEDY, strict=True)
    assert torch.equal(group.rollouts[0].logprobs, expected[0].rollouts[0].logprobs)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_knows_its_classes(family, make_engine):
    model = tiny_model(family)
    name = decoder_name(model)
    head_norms = [".layers.1.self_attn.q_norm", ".layers.0.self_attn.k_norm"] if "qwen3" in family else []
    for path in {"model", *(f"{name}{part}" for part in PARTS + head_norms)}:
        other = copy.deepcopy(model)
        _subclass(other, path)
        with pytest.raises(ValueError, match=rf"expected a .*got .*FSDP.*\({path}\)"):
            make_engine(other)
    assert make_engine(model).shares_weights


def test_another_activation(make_engine):
    model = tiny_model("llama")
    engine = make_engine(model)
    model.model.layers[1].mlp.act_fn = nn.GELU()
    with pytest.raises(ValueError, match=r"SiLUActivation, got torch.nn.GELU \(model.layers.1.mlp.act_fn\)"):
        engine.generate(GREEDY)


def test_classes_that_were_replaced(make_engine, monkeypatch):
    """As libraries of kernels put their own classes in transformers' place, before the model is made."""
    from transformers.models.llama import modeling_llama

    other = type("FastRMSNorm", (modeling_llama.LlamaRMSNorm,), {})
    monkeypatch.setattr(modeling_llama, llama.CLASSES.norm, other)
    with pytest.raises(ValueError, match=r"transformers' own LlamaRMSNorm, got .*FastRMSNorm \(model\)"):
        make_engine(tiny_model("llama"))


@pytest.mark.parametrize("wrap", [Outer, torch.compile], ids=["wrapper", "compiled"])
def test_a_wrapped_model(wrap, make_engine):
    wrapped = wrap(tiny_model("llama"))
    with pytest.raises(ValueError, match=rf"a model of one of .*, got '{type(wrapped).__name__}' \(model\)"):
        make_engine(wrapped)


def test_layers_that_come_and_go(make_engine):
    model = tiny_model("llama")
    engine = make_engine(model)
    model.model.layers.append(copy.deepcopy(model.model.layers[1]))
    for attempt in (lambda: engine.generate(GREEDY), lambda: make_engine(model)):
        with pytest.raises(ValueError, match=r"at most num_hidden_layers = 2 layers, got 3 \(model.layers\)"):
            attempt()
    model.config.num_hidden_layers = 3
    with pytest.raises(ValueError, match=r"expected 2 layers, as the engine was built with, got 3 \(model.layers\)"):
        engine.generate(GREEDY)
    assert make_engine(model).generate(GREEDY)[0].error is None
    model.model.layers = model.model.layers[:1]
    with pytest.raises(ValueError, match=r"expected 2 layers, as the engine was built with, got 1 \(model.layers\)"):
        engine.generate(GREEDY)


def test_another_vocabulary(make_engine):
    """`resize_token_embeddings` puts another LM head in place: masks, bans and checks of ids are of the old one."""
    model = tiny_model("llama")
    engine = make_engine(model)
    model.resize_token_embeddings(300, mean_resizing=False)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"271 ids, as the engine was built with, got 300 \(lm_head\)"):
            engine.generate(GREEDY)
    assert make_engine(model).generate(GREEDY)[0].error is None


def test_another_decoder(make_engine):
    model = tiny_model("llama")
    engine = make_engine(model)
    model.model = tiny_model("llama", seed=1).model
    for _ in range(2):
        with pytest.raises(ValueError, match=r"the decoder that the engine was built with, got another one \(model\)"):
            engine.generate(GREEDY)


def _checkpointing(model):
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.train()
    model(input_ids=torch.tensor([[1, 2]])).logits.sum().backward()


def _all_outputs(model):
    model(input_ids=torch.tensor([[1, 2]]), output_hidden_states=True, output_attentions=True)


HARMLESS = {
    "enable_input_require_grads": lambda model: model.enable_input_require_grads(),
    "gradient checkpointing": _checkpointing,
    "hidden states": _all_outputs,
    "backward hook": lambda model: model.model.layers[0].register_full_backward_hook(lambda *args: None),
    "the model's own call": lambda model: model.register_forward_hook(lambda *args: None),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HARMLESS)
def test_what_leaves_every_value_is_accepted(name, make_engine, assert_logprobs, monkeypatch):
    """And read at most once more, not before every step."""
    model = tiny_model("llama")
    engine = make_engine(model)
    HARMLESS[name](model)
    reads = []
    original = engine._weights.adopt
    monkeypatch.setattr(engine._weights, "adopt", lambda: reads.append(original()))
    for _ in range(2):
        assert_logprobs(model, engine.generate(GREEDY, strict=True))
    assert len(reads) <= 1
    assert_logprobs(model, make_engine(model).generate(GREEDY, strict=True))


def test_the_hooks_that_are_harmless_exist():
    """Under the names by which they are known; both leave the output as it is."""
    model = tiny_model("llama")
    model.enable_input_require_grads()
    _all_outputs(model)
    hooks = {(hook.__module__, hook.__name__) for module in model.modules() for hook in module._forward_hooks.values()}
    assert hooks == {known for known in watch.HARMLESS_HOOKS if known[0].startswith("transformers")}


def test_another_hook_beside_a_harmless_one(make_engine):
    model = tiny_model("llama")
    model.enable_input_require_grads()
    engine = make_engine(model)
    engine.generate(GREEDY, strict=True)
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: output * 7)
    with pytest.raises(ValueError, match=r"nn.Embedding without forward hooks, got one with hooks \(model.embed_tok"):
        engine.generate(GREEDY)
