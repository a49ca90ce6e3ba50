"""Weights that come one tensor at a time: what was promised is checked before, each item before it is copied."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch

from foveate.rollout.config import SamplingParams
from foveate.rollout.testing import tiny_model
from foveate.rollout.types import Request

NORM = "model.layers.1.input_layernorm.weight"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Weights = dict[str, torch.Tensor]


def greedy(prompt="see", **fields) -> Request:
    return Request(prompt, sampling=SamplingParams(temperature=0, max_tokens=6, ignore_eos=True), **fields)


def answer(engine, request=None) -> list[int]:
    (group,) = engine.generate([request or greedy()], strict=True)
    return group.rollouts[0].token_ids.tolist()


def state(model) -> Weights:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def is_state(model, expected: Weights) -> bool:
    now = model.state_dict()
    return now.keys() == expected.keys() and all(torch.equal(now[name], expected[name]) for name in now)


def manifest_of(weights: Weights) -> dict:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()}


def without(weights, name: str):
    return {key: value for key, value in weights.items() if key != name}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("has_manifest", [True, False])
def test_a_stream_gives_the_weights_of_its_source(has_manifest, dtype, make_engine):
    model, source = tiny_model("qwen2_5_vl"), tiny_model("qwen2_5_vl", seed=5).to(dtype)
    engine = make_engine(model)
    before = answer(engine)
    weights = dict(source.named_parameters())
    manifest = manifest_of(weights) if has_manifest else None
    assert engine.update_weights(iter(weights.items()), manifest=manifest) == engine.weight_version == 1
    assert is_state(model, {name: tensor.float() for name, tensor in source.state_dict().items()})
    assert answer(engine) == answer(make_engine(copy.deepcopy(model))) != before
    assert engine.vision_version == 1


@pytest.mark.parametrize("has_manifest", [True, False])
def test_a_stream_into_a_shadow(has_manifest, make_engine):
    model, source = tiny_model("qwen3"), tiny_model("qwen3", seed=5)
    engine, before = make_engine(model, dtype=torch.float64), state(model)
    weights = dict(source.named_parameters())
    manifest = manifest_of(weights) if has_manifest else None
    engine.update_weights(iter(weights.items()), manifest=manifest)
    assert is_state(model, before)
    assert answer(engine) == answer(make_engine(source, dtype=torch.float64))


@pytest.mark.parametrize("has_manifest", [True, False])
def test_one_tensor_at_a_time(has_manifest, make_engine):
    """No tensor is alive when the next one is made, tied ones and those that are cast included."""
    engine = make_engine(model := tiny_model("llama", tie_word_embeddings=True))
    new = tiny_model("llama", seed=5, tie_word_embeddings=True).state_dict()
    made: list[weakref.ref] = []
    alive: list[int] = []

    def make(name: str) -> torch.Tensor:
        alive.append(sum(ref() is not None for ref in made))
        tensor = new[name].double()
        made.append(weakref.ref(tensor))
        return tensor

    manifest = {name: (list(tensor.shape), torch.float64) for name, tensor in new.items()} if has_manifest else None
    engine.update_weights(((name, make(name)) for name in new), manifest=manifest)
    assert alive == [0] * len(new)
    assert [ref() for ref in made] == [None] * len(new)
    assert is_state(model, new)


BAD_MANIFESTS: dict[str, tuple[Callable, str]] = {
    "unknown": (lambda m: m | {"model.nothing": ((1,), torch.float32)}, "'model.nothing'"),
    "missing": (lambda m: without(m, NORM), rf"none for \['{NORM}'\] \(missing: 1\)"),
    "shape": (lambda m: m | {NORM: ((49,), torch.float32)}, rf"\[48\], got .*\[49\] \(manifest, {NORM}\)"),
    "dtype": (lambda m: m | {NORM: ((48,), torch.int8)}, rf"floating .*torch.int8.*\(manifest, {NORM}\)"),
    "no dtype": (lambda m: m | {NORM: ((48,), "float32")}, rf"floating .*float32 .*\(manifest, {NORM}\)"),
    "twice": (lambda m: m | {"layers.1.input_layernorm.weight": ((48,), torch.float32)}, rf"'{NORM}' twice"),
    "no pair": (lambda m: m | {NORM: torch.float32}, rf"\(shape, dtype\), got torch.float32 \(manifest, {NORM}\)"),
    "no shape": (lambda m: m | {NORM: (48, torch.float32)}, r"\(shape, dtype\), got \(48"),
    "a list": (lambda m: list(m.items()), r"a mapping from names .* got list \(manifest\)"),
}


@pytest.mark.parametrize("in_flight", ["abort", "keep"])
@pytest.mark.parametrize("case", BAD_MANIFESTS)
def test_a_bad_manifest_changes_nothing_and_reads_nothing(case, in_flight, make_engine):
    engine = make_engine(model := tiny_model("llama"))
    before, expected = state(model), answer(engine)
    engine.add_request(greedy())
    weights = tiny_model("llama", seed=5).state_dict()
    change, message = BAD_MANIFESTS[case]
    items = iter(weights.items())
    with pytest.raises(ValueError, match=message):
        engine.update_weights(items, manifest=change(manifest_of(weights)), in_flight=in_flight)
    assert len(list(items)) == len(weights)
    assert is_state(model, before)
    assert (engine.weight_version, engine.stats()["waiting"]) == (0, 1)
    assert answer(engine) == expected


@pytest.mark.parametrize("kind", [dict, list, tuple])
@pytest.mark.parametrize("case", ["more", "less", "dtype", "nothing"])
def test_a_whole_update_that_breaks_its_manifest_changes_nothing(case, kind, make_engine):
    engine = make_engine(model := tiny_model("llama"))
    before, weights = state(model), tiny_model("llama", seed=5).state_dict()
    manifest = manifest_of(weights)
    if case == "more":
        manifest = without(manifest, NORM)
    elif case == "dtype":
        manifest[NORM] = ((48,), torch.bfloat16)
    named = {"less": without(weights, NORM), "nothing": {}}.get(case, weights)
    with pytest.raises(ValueError, match=r"expected .*(manifest|missing)"):
        engine.update_weights(named if kind is dict else kind(named.items()), manifest=manifest, partial=True)
    assert is_state(model, before)
    assert engine.weight_version == 0
    answer(engine)


class Broken(Exception):
    """What a source of weights raises when it breaks off."""


def breaking(weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    yield from list(weights.items())[:5]
    raise Broken("gone")


BAD_STREAMS: dict[str, tuple[Callable, type[Exception], str]] = {
    "unknown": (lambda w: [*w.items(), ("nothing", torch.zeros(1))], ValueError, "'nothing'"),
    "missing": (lambda w: without(w, NORM).items(), ValueError, rf"none for \['{NORM}'\] \(missing: 1\)"),
    "nothing": (lambda w: [], ValueError, r"missing: "),
    "shape": (lambda w: (w | {NORM: torch.zeros(49)}).items(), ValueError, rf"got .*\[49\] on cpu \({NORM}\)"),
    "dtype": (lambda w: (w | {NORM: torch.zeros(48).int()}).items(), ValueError, "floating .*torch.int32"),
    "meta": (lambda w: (w | {NORM: torch.zeros(48, device="meta")}).items(), ValueError, "on meta"),
    "array": (lambda w: (w | {NORM: [0.0] * 48}).items(), ValueError, rf"got list \({NORM}\)"),
    "no pair": (lambda w: [*w.items(), NORM], ValueError, "pairs of a name and a tensor, got str"),
    "no name": (lambda w: [(0, torch.zeros(1)), *w.items()], ValueError, "pairs of a name and a tensor"),
    "twice": (lambda w: [*w.items(), (NORM[6:], w[NORM])], ValueError, rf"'{NORM}' twice"),
    "tied": (lambda w: (w | {HEAD: w[EMBED] + 1}).items(), ValueError, f"tied parameters.*{EMBED}, {HEAD}"),
    "raises": (breaking, Broken, "gone"),
}


@pytest.mark.parametrize("has_manifest", [True, False])
@pytest.mark.parametrize("case", BAD_STREAMS)
def test_a_stream_that_breaks_off_stops_the_engine_until_a_complete_one(case, has_manifest, make_engine):
    engine = make_engine(tiny_model("llama", tie_word_embeddings=True))
    good = tiny_model("llama", seed=5, tie_word_embeddings=True)
    weights = good.state_dict()
    make, kind, message = BAD_STREAMS[case]
    manifest = manifest_of(weights) if has_manifest else None
    with pytest.raises(kind, match=message):
        engine.update_weights(iter(make(weights)), manifest=manifest)
    engine.add_request(greedy())
    for refused in (engine.step, lambda: engine.generate([greedy()]), lambda: next(engine.stream([greedy()]))):
        with pytest.raises(ValueError, match="expected a complete update_weights"):
            refused()
    engine.update_weights({NORM: weights[NORM]}, partial=True, in_flight="keep")
    with pytest.raises(ValueError, match="expected a complete update_weights"):
        engine.step()
    engine.update_weights(iter(weights.items()), in_flight="abort")
    assert [group.rollouts[0].finish_reason for group in engine.step()] == ["abort"]
    assert answer(engine) == answer(make_engine(good))


def test_a_stream_may_differ_from_its_manifest_in_names_alone(make_engine):
    """The manifest with today's names, the stream with yesterday's."""
    engine = make_engine(model := tiny_model("qwen2_5_vl"))
    weights = tiny_model("qwen2_5_vl", seed=5).state_dict()
    renamed = (("model.language_model.", "model."), ("model.visual.", "visual."))
    old = {next((b + n[len(a) :] for a, b in renamed if n.startswith(a)), n): w for n, w in weights.items()}
    assert old.keys() != weights.keys()
    engine.update_weights(iter(old.items()), manifest=manifest_of(weights))
    assert is_state(model, weights)
    wrong = without(weights, HEAD) | {HEAD: weights[HEAD].bfloat16()}
    with pytest.raises(ValueError, match=r"float32 as in the manifest, got torch.bfloat16 \(lm_head.weight\)"):
        engine.update_weights(iter(wrong.items()), manifest=manifest_of(weights))


def test_a_stream_brings_nothing_beyond_its_manifest(make_engine):
    engine = make_engine(model := tiny_model("llama"))
    weights = tiny_model("llama", seed=5).state_dict()
    expected = state(model) | {NORM: weights[NORM]}
    with pytest.raises(ValueError, match=r"names of the manifest alone, got 'lm_head.weight'"):
        engine.update_weights(
            iter([(NORM, weights[NORM]), (HEAD, weights[HEAD])]), manifest={NORM: ((48,), torch.float32)}, partial=True
        )
    assert is_state(model, expected)
    with pytest.raises(ValueError, match="expected a complete update_weights"):
        engine.step()


@pytest.mark.parametrize("has_manifest", [True, False])
def test_partial_streams(has_manifest, make_engine):
    engine = make_engine(model := tiny_model("llama"))
    expected = state(model) | {NORM: torch.randn(48)}
    for named in ({NORM: expected[NORM]}, {}):
        manifest = manifest_of(named) if has_manifest else None
        engine.update_weights(iter(named.items()), manifest=manifest, partial=True)
        assert is_state(model, expected)
    assert engine.weight_version == 2
    assert answer(engine) == answer(make_engine(copy.deepcopy(model)))


def test_nothing_runs_while_a_stream_is_read(make_engine):
    engine = make_engine("llama")
    weights = tiny_model("llama", seed=5).state_dict()

    def reading() -> Iterator[tuple[str, torch.Tensor]]:
        for item in weights.items():
            with pytest.raises(ValueError, match="expected a complete update_weights"):
                engine.generate([greedy()])
            yield item

    engine.update_weights(reading())
    assert answer(engine) == answer(make_engine(tiny_model("llama", seed=5)))


def test_a_source_keeps_its_own_gradient_mode(make_engine):
    seen = []

    def reading() -> Iterator[tuple[str, torch.Tensor]]:
        for item in tiny_model("llama", seed=5).state_dict().items():
            seen.append(torch.is_grad_enabled())
            yield item

    make_engine("llama").update_weights(reading())
    assert all(seen)


@pytest.mark.parametrize("has_manifest", [True, False])
def test_streams_and_the_tower(has_manifest, make_engine):
    engine = make_engine(tiny_model("qwen2_5_vl"))
    weights = tiny_model("qwen2_5_vl", seed=5).state_dict()
    tower = {name: tensor for name, tensor in weights.items() if "visual" in name}
    language = {name: tensor for name, tensor in weights.items() if "visual" not in name}
    for named, said, version in (({}, None, 0), (language, None, 0), (tower, None, 1), (language, True, 2)):
        manifest = manifest_of(named) if has_manifest else None
        engine.update_weights(iter(named.items()), manifest=manifest, partial=True, vision_changed=said)
        assert engine.vision_version == version
    with pytest.raises(ValueError, match=r"'model.visual.* \(vision_changed=False\)"):
        engine.update_weights(
            iter(weights.items()), manifest=manifest_of(weights) if has_manifest else None, vision_changed=False
        )
    if has_manifest:
        answer(engine)
    else:
        with pytest.raises(ValueError, match="expected a complete update_weights"):
            engine.step()


def test_features_of_a_tower_that_an_update_left_half_way(make_engine, picture):
    """The tower is frozen, so an update without names would keep its features; part of it was written all the same."""
    engine = make_engine(model := tiny_model("qwen2_5_vl"))
    model.model.visual.requires_grad_(False)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "See?"}]}]
    request = greedy(messages, images=[picture(84, 56)])
    answer(engine, request)
    weights = tiny_model("qwen2_5_vl", seed=5).state_dict()
    tower = [item for item in weights.items() if "visual" in item[0]]
    with pytest.raises(ValueError, match="missing"):
        engine.update_weights(iter(tower))
    assert engine.vision_version == 0
    engine.update_weights(vision_changed=False)
    assert engine.vision_version == 1
    assert answer(engine, request) == answer(make_engine(copy.deepcopy(model)), request)
    assert engine.stats()["images_encoded"] == 2
    engine.update_weights()
    assert engine.vision_version == 1


def test_a_named_update_of_a_shadow_whose_parameters_moved(make_engine):
    """What moved is read before, so that what comes by name is not overwritten by what stands in the module."""
    model, source = tiny_model("qwen2"), tiny_model("qwen2", seed=5)
    engine = make_engine(model, dtype=torch.float64)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    engine.update_weights(source.state_dict())
    assert answer(engine) == answer(make_engine(source, dtype=torch.float64))


def test_two_engines_on_one_module(make_engine):
    """What one engine writes is in the module; the other takes it with an update of its own."""
    model, weights = tiny_model("llama"), tiny_model("llama", seed=5).state_dict()
    first, second = make_engine(model), make_engine(model)
    before = answer(second)
    first.update_weights(iter(weights.items()))
    second.update_weights()
    assert answer(first) == answer(second) == answer(make_engine(tiny_model("llama", seed=5))) != before
    assert (first.weight_version, second.weight_version) == (1, 1)


def test_a_stream_into_low_rank_adapters(make_engine):
    peft = pytest.importorskip("peft")

    def adapted(seed: int):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        return peft.get_peft_model(tiny_model("qwen2", seed=seed), config)

    model, source = adapted(4), adapted(5)
    engine = make_engine(model)
    before = answer(engine)
    adapters = {name: value for name, value in source.named_parameters() if "lora" in name}
    engine.update_weights(iter(adapters.items()), partial=True)
    assert answer(engine) == answer(make_engine(copy.deepcopy(model))) != before
    engine.update_weights(iter(dict(source.named_parameters()).items()))
    assert answer(engine) == answer(make_engine(source))


def test_an_update_of_a_module_that_cannot_be_shared_any_more_changes_nothing(make_engine):
    engine = make_engine(model := tiny_model("llama"))
    before, layer = state(model), model.model.layers[1].self_attn
    plain, layer.o_proj = layer.o_proj, torch.nn.Sequential(layer.o_proj)
    for named in ((), {NORM: torch.zeros(48)}, iter([(NORM, torch.zeros(48))])):
        with pytest.raises(ValueError, match=r"torch.nn.Linear.*\(model.layers.1.self_attn.o_proj\)"):
            engine.update_weights(named, partial=True)
    layer.o_proj = plain
    assert is_state(model, before)
    assert engine.weight_version == 0
    answer(engine)
