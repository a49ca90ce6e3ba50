"""The engine on the trainer's own parameters: where they lie, that changes are seen, that checkpoints are whole."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref

import pytest
import torch
from torch import nn

from foveate.rollout.config import SamplingParams
from foveate.rollout.testing import FAMILIES, tiny_model
from foveate.rollout.types import Request


@pytest.fixture
def requests(chat, picture):
    """(model) -> greedy and sampled requests, with an image for a VLM."""

    def make(model: nn.Module) -> list[Request]:
        images = [picture(84, 56)] if model.config.model_type == "qwen2_5_vl" else []
        greedy = SamplingParams(temperature=0, max_tokens=8)
        return [chat("See?", images, n=2, max_tokens=8, seed=1), Request("plain", sampling=greedy)]

    return make


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_state(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    now = model.state_dict()
    assert now.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(now[name], tensor), name


def assert_same(groups, others) -> None:
    """Equal tokens, and log-probs but for the rounding of another memory alignment."""
    for group, other in zip(groups, others, strict=True):
        for rollout, twin in zip(group.rollouts, other.rollouts, strict=True):
            assert rollout.token_ids.tolist() == twin.token_ids.tolist()
            torch.testing.assert_close(rollout.logprobs, twin.logprobs, atol=5e-5, rtol=0)


def differ(groups, others) -> bool:
    return any(
        rollout.token_ids.tolist() != twin.token_ids.tolist()
        for group, other in zip(groups, others, strict=True)
        for rollout, twin in zip(group.rollouts, other.rollouts, strict=True)
    )


def train_step(model: nn.Module) -> None:
    """One AdamW step, in place, on made-up gradients."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.05)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def pointers(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {name: (id(p), p.data_ptr()) for name, p in model.named_parameters(remove_duplicate=False)}


def attention_of(model: nn.Module) -> nn.Module:
    return getattr(model.model, "language_model", model.model).layers[1].self_attn


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_stay_where_they_are(family, make_engine, requests):
    model = tiny_model(family)
    before, objects = state(model), {name: id(p) for name, p in model.named_parameters()}
    engine = make_engine(model)
    assert engine.shares_weights
    assert_state(model, before)
    assert {name: id(p) for name, p in model.named_parameters()} == objects
    addresses = pointers(model)
    for _ in range(2):
        engine.generate(requests(model), strict=True)
        train_step(model)
        engine.update_weights()
    engine.update_weights(state(model))
    assert pointers(model) == addresses
    assert engine.weight_version == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_parts_own_their_storage(family, make_engine):
    model = tiny_model(family)
    make_engine(model)
    parts = [attention_of(model).q_proj, attention_of(model).k_proj, attention_of(model).v_proj]
    for name in ("weight", "bias"):
        tensors = [getattr(part, name) for part in parts if getattr(part, name) is not None]
        for one, following in itertools.pairwise(tensors):
            assert following.data_ptr() == one.data_ptr() + one.nbytes
    for name, parameter in model.named_parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes, name
        assert parameter.is_leaf, name
        assert parameter.requires_grad, name


def test_fuse_false_moves_nothing(make_engine, requests):
    model = tiny_model("qwen2_5_vl")
    addresses = pointers(model)
    engine = make_engine(model, fuse=False)
    groups = engine.generate(requests(model))
    assert pointers(model) == addresses
    assert engine.shares_weights
    assert_same(groups, make_engine(copy.deepcopy(model)).generate(requests(model)))


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_optimiser_step_changes_the_next_rollout(family, fuse, make_engine, requests):
    model = tiny_model(family)
    engine = make_engine(model, fuse=fuse)
    before = engine.generate(requests(model), strict=True)
    train_step(model)
    assert engine.update_weights() == engine.weight_version == 1
    after = engine.generate(requests(model), strict=True)
    assert differ(before, after)
    assert_same(after, make_engine(copy.deepcopy(model)).generate(requests(model)))
    assert before[0].rollouts[0].weight_versions[0][2] == 0
    assert after[0].rollouts[0].weight_versions[0][2] == 1


@pytest.mark.parametrize(
    ("trainable", "changed", "encoded"), [(True, None, 2), (False, None, 1), (False, True, 2), (True, False, 1)]
)
def test_features_under_old_weights(trainable, changed, encoded, make_engine, requests):
    """A trained tower's features are made anew, a frozen one's kept; the caller may know better."""
    model = tiny_model("qwen2_5_vl")
    model.model.visual.requires_grad_(trainable)
    engine = make_engine(model)
    engine.generate(requests(model), strict=True)
    if encoded == 2:
        with torch.no_grad():
            for parameter in model.model.visual.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    engine.update_weights(vision_changed=changed)
    groups = engine.generate(requests(model), strict=True)
    assert (engine.stats()["images_encoded"], engine.vision_version) == (encoded, encoded - 1)
    assert_same(groups, make_engine(copy.deepcopy(model)).generate(requests(model)))


def test_unfinished_requests_at_an_update(make_engine, requests):
    """Refused by default; aborted on demand, and then their prompt is computed anew."""
    model = tiny_model("qwen2_5_vl")
    engine = make_engine(model)
    request = requests(model)[0]
    for _ in range(2):
        engine.add_request(request)
    engine.step()
    engine.step()
    engine.add_request(request)  # still waiting
    prefilled = engine.stats()["prefilled_tokens"]
    with pytest.raises(ValueError, match=r"expected no unfinished requests, got 3: .*request-0.*in_flight"):
        engine.update_weights()
    with pytest.raises(ValueError, match=r"one of \('error', 'abort', 'keep'\), got 'pause' \(in_flight\)"):
        engine.update_weights(in_flight="pause")
    assert engine.weight_version == 0
    train_step(model)
    engine.update_weights(in_flight="abort")
    groups = engine.generate([request]) + engine.step()
    assert engine.stats()["prefilled_tokens"] == 2 * prefilled
    assert_same(groups[:1], make_engine(copy.deepcopy(model)).generate([request, request, request, request])[3:])
    assert [r.finish_reason for group in groups[1:] for r in group.rollouts] == ["abort"] * 6
    assert [len(r.token_ids) for group in groups[1:] for r in group.rollouts] == [2] * 4 + [0] * 2
    assert groups[1].rollouts[0].weight_versions == ((0, 2, 0),)


@pytest.mark.parametrize("engine_lives", [True, False])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("how", ["accelerate", "safetensors", "save_pretrained", "torch"])
def test_checkpoints_are_whole(how, tied, engine_lives, make_engine, tmp_path):
    model = tiny_model("qwen2_5_vl", tie_word_embeddings=tied)
    engine = make_engine(model)
    train_step(model)
    expected = state(model)
    if not engine_lives:
        del engine
        gc.collect()
    other = tiny_model("qwen2_5_vl", seed=99, tie_word_embeddings=tied)
    if how == "accelerate":
        accelerate = pytest.importorskip("accelerate")
        accelerate.Accelerator(cpu=True).save_model(model, tmp_path)
        accelerate.load_checkpoint_in_model(other, tmp_path)
        other.tie_weights()
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    elif how == "safetensors":
        from safetensors.torch import load_model, save_model

        save_model(model, tmp_path / "model.safetensors")
        assert load_model(other, tmp_path / "model.safetensors") == (set(), [])
    elif how == "save_pretrained":
        model.save_pretrained(tmp_path)
        other = type(model).from_pretrained(tmp_path)
    else:
        torch.save(model.state_dict(), tmp_path / "state")
        other.load_state_dict(torch.load(tmp_path / "state"))
    assert_state(other, expected)
    assert_state(model, expected)


def test_a_second_engine_adopts_the_buffers(make_engine, requests):
    model = tiny_model("qwen2_5_vl")
    first = make_engine(model)
    addresses = pointers(model)
    second = make_engine(model)
    assert pointers(model) == addresses
    train_step(model)
    for engine in (first, second):
        engine.update_weights()
    groups = [engine.generate(requests(model), strict=True) for engine in (first, second)]
    assert_same(*groups)
    assert first._weights.layers[0].qkv[0][0] is second._weights.layers[0].qkv[0][0]


def test_deleted_engines_free_their_memory(make_engine, requests):
    model = tiny_model("qwen2_5_vl")
    expected = state(model)
    engine = make_engine(model, dtype=torch.bfloat16)
    engine.generate(requests(model))
    shared = make_engine(model)
    groups = shared.generate(requests(model))
    dead = [weakref.ref(x) for e in (engine, shared) for x in (e, e._runner, e._runner.kv_pool, e._weights)]
    del engine, shared
    gc.collect()
    assert [ref() for ref in dead] == [None] * len(dead)
    assert_state(model, expected)
    assert_same(make_engine(model).generate(requests(model)), groups)
    gone = weakref.ref(attention_of(model))
    del model
    gc.collect()
    assert gone() is None


def test_shadow_in_another_dtype(make_engine, requests):
    model = tiny_model("qwen2_5_vl", tie_word_embeddings=True)
    addresses, expected = pointers(model), state(model)
    engine = make_engine(model, dtype=torch.bfloat16)
    assert not engine.shares_weights
    decoder_bytes = sum(p.nbytes for p in model.model.language_model.parameters())
    report = engine.memory_report()
    assert (report["shadow_weights"], report["shared_weights"]) == (decoder_bytes // 2, 0)
    assert engine._runner.kv_pool.dtype == torch.bfloat16
    before = engine.generate(requests(model), strict=True)
    assert pointers(model) == addresses
    assert_state(model, expected)
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    assert_same(engine.generate(requests(model), strict=True)[1:], before[1:])  # the greedy one: no seed needed
    engine.update_weights()
    after = engine.generate(requests(model), strict=True)
    assert differ(before, after)
    assert_same(after, make_engine(copy.deepcopy(model), dtype=torch.bfloat16).generate(requests(model)))
    assert engine.memory_report()["shadow_weights"] == decoder_bytes // 2


def test_shadow_of_moved_parameters_does_not_pile_up(make_engine, requests):
    model = tiny_model("llama")
    engine = make_engine(model, dtype=torch.float64)
    size = engine.memory_report()["shadow_weights"]
    source = tiny_model("llama", seed=5)
    model.load_state_dict(source.state_dict(), assign=True)
    engine.update_weights()
    assert engine.memory_report()["shadow_weights"] == size
    assert_same(engine.generate(requests(model)), make_engine(source, dtype=torch.float64).generate(requests(model)))


class Lora(nn.Linear):
    """A subclass whose weight alone is not what its forward computes."""


def _hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, output: output + 1)


UNSHARED = {
    "subclass": lambda owner, name: setattr(owner, name, Lora(*getattr(owner, name).weight.shape[::-1])),
    "wrapper": lambda owner, name: setattr(owner, name, nn.Sequential(getattr(owner, name))),
    "hook": lambda owner, name: _hook(getattr(owner, name)),
    "pre-hook": lambda owner, name: getattr(owner, name).register_forward_pre_hook(lambda module, args: args),
    "forward": lambda owner, name: setattr(getattr(owner, name), "forward", lambda x: x),
    "parametrised": lambda owner, name: nn.utils.parametrizations.weight_norm(getattr(owner, name)),
}


@pytest.mark.parametrize("kind", UNSHARED)
@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj", "lm_head"])
def test_modules_that_cannot_be_shared_are_refused_by_name(kind, name, make_engine):
    model = tiny_model("llama")
    full = name if name == "lm_head" else f"model.layers.1.{name}"
    owner, _, child = full.rpartition(".")
    UNSHARED[kind](model.get_submodule(owner), child)
    with pytest.raises(ValueError, match=rf"expected a.* torch.nn.Linear.*\({full}\)"):
        make_engine(model)


class Wrapper(nn.Module):
    """As an adapter library wraps a projection: the plain module lives on inside."""

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer


@pytest.mark.parametrize("full", ["model.layers.1.self_attn.o_proj", "model.layers.0.mlp.up_proj", "lm_head"])
def test_a_wrapper_put_on_later_is_refused_by_name(full, make_engine, requests):
    model = tiny_model("llama")
    engine = make_engine(model)
    owner, _, child = full.rpartition(".")
    setattr(model.get_submodule(owner), child, Wrapper(model.get_submodule(full)))
    for _ in range(2):  # a refusal is no adoption
        with pytest.raises(ValueError, match=rf"expected a.* torch.nn.Linear.*\({full}\)"):
            engine.generate(requests(model))
    setattr(model.get_submodule(owner), child, model.get_submodule(full).base_layer)
    assert all(group.error is None for group in engine.generate(requests(model)))


def test_an_embedding_that_cannot_be_shared_is_refused_by_name(make_engine):
    model = tiny_model("llama")
    nn.utils.parametrizations.weight_norm(model.model.embed_tokens)
    with pytest.raises(ValueError, match=r"expected .*model.embed_tokens"):
        make_engine(model)


def test_a_parameter_in_another_dtype_is_refused_by_name(make_engine):
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"float32 on cpu, got torch.bfloat16.*model.layers.1.mlp.down_proj.weight"):
        make_engine(model)


def _move(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def _replace(model: nn.Module) -> None:
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().clone()))


MOVES = {
    "data": _move,
    "parameter": _replace,
    "load_state_dict": lambda model: model.load_state_dict(state(model)),
    "assign": lambda model: model.load_state_dict(state(model), assign=True),
}


@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize("how", MOVES)
def test_moved_parameters_are_read_where_they_are_now(how, update, make_engine, requests):
    model = tiny_model("qwen2_5_vl")
    engine = make_engine(model)
    before = engine.generate(requests(model), strict=True)
    train_step(model)
    MOVES[how](model)
    trained = state(model)
    if update:
        engine.update_weights()
    else:
        engine._runner.vision.clear()
    after = engine.generate(requests(model), strict=True)
    assert differ(before, after)
    assert_state(model, trained)
    assert_same(after, make_engine(copy.deepcopy(model)).generate(requests(model)))
    train_step(model)  # and they are shared again
    engine.update_weights()
    assert_same(engine.generate(requests(model)), make_engine(copy.deepcopy(model)).generate(requests(model)))
