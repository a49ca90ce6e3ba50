"""Checkpoints that a crash or another run cannot tear."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from foveate.rollout import checkpoint, generators, resumption
from foveate.rollout.config import PruneConfig
from foveate.rollout.grpo import GRPOConfig
from foveate.rollout.testing import tiny_model
from foveate.rollout.types import Request


def trained(step: float = 0.1, kind=torch.optim.AdamW):
    """A model and its optimiser after one step."""
    model = tiny_model("qwen2")
    optimizer = kind(model.parameters(), lr=step)
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    optimizer.step()
    return model, optimizer


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(model, expected):
    return all(torch.equal(parameter, expected[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("how", ["error", "kill"])
def test_a_crash_between_the_renames_loses_no_checkpoint(how, tmp_path, monkeypatch):
    directory = tmp_path / "step-1"
    model, optimizer = trained()
    checkpoint.save(directory, model, optimizer, {"step": 1})
    first = weights(model)
    rename, calls = os.replace, []

    def break_second(source, target):
        calls.append(source)
        if len(calls) == 2 or (how == "kill" and len(calls) > 2):
            raise OSError("the disk is gone")
        rename(source, target)

    monkeypatch.setattr(os, "replace", break_second)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    with pytest.raises(OSError, match="gone"):
        checkpoint.save(directory, model, optimizer, {"step": 2})
    monkeypatch.undo()
    assert directory.exists() == (how == "error")
    assert checkpoint.load(directory, model, optimizer) == {"step": 1}
    assert same(model, first)


def _other_optimizer(directory):
    return tiny_model("qwen2"), torch.optim.SGD(tiny_model("qwen2").parameters(), lr=0.1, momentum=0.9)


def _without_generators(directory):
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "trainer.safetensors")
    save_file({k: v for k, v in tensors.items() if k != "rng/0/cpu"}, directory / "trainer.safetensors")
    return trained()


def _pickled(directory):
    from safetensors.torch import load_file

    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    return trained()


def _other_frozen_weights(directory):
    model, optimizer = trained()
    model.lm_head.weight.requires_grad_(False)
    checkpoint.save(directory, model, optimizer, {"step": 1})
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    return model, optimizer


def _without_a_weight(directory):
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return trained()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_other_optimizer, "a checkpoint of SGD, got 'AdamW'"),
        (_without_generators, "state of the generators"),
        (_pickled, "weights of every parameter"),
        (_other_frozen_weights, r"the frozen weights with which the run was begun, got 'others' \(model\)"),
        (_without_a_weight, r"every parameter, got \['model.norm.weight'\]"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(damage, message, tmp_path):
    checkpoint.save(tmp_path / "a", *trained(), {"step": 1})
    model, optimizer = damage(tmp_path / "a")
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(tmp_path / "a", model, optimizer)
    assert same(model, before)


def test_the_state_is_readable_json(tmp_path):
    checkpoint.save(tmp_path / "a", *trained(), {"step": 3})
    content = json.loads((tmp_path / "a" / "trainer.json").read_text())
    assert content == {"optimizer": "AdamW", "frozen": resumption.checksum({}), "state": {"step": 3}}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_every_generator_goes_on_where_it_was():
    def drawn():
        return [random.random(), random.gauss(0, 1), np.random.normal(), np.random.rand(), torch.rand(()).item()]

    cpu = torch.device("cpu")
    random.gauss(0, 1), np.random.normal()  # one of a pair is left over in each
    held = generators.states(cpu)
    first = drawn()
    drawn()
    generators.restore(held, cpu)
    assert drawn() == first


def test_what_belongs_to_a_checkpoint_is_there_before_its_name(tmp_path):
    seen = []

    def write_more(folder):
        seen.append((folder / "trainer.json").exists())
        assert not (tmp_path / "a").exists()
        (folder / "tokenizer.json").write_text("{}")

    checkpoint.save(tmp_path / "a", *trained(), {}, write_more)
    assert seen == [True]
    assert (tmp_path / "a" / "tokenizer.json").read_text() == "{}"

    def broken(folder):
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        checkpoint.save(tmp_path / "b", *trained(), {}, broken)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("rename", [False, True])
def test_weights_of_several_types_and_names_come_back(rename, tmp_path):
    """Norms in float32 beside bfloat16 matrices; and a type whose files have other names than the module."""

    def mixed():
        model = tiny_model("qwen2").to(torch.bfloat16)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data = parameter.data.float()
        if rename:
            projection = model.model.layers[0].mlp.down_proj
            model.model.layers[0].mlp.down_proj = torch.nn.utils.parametrizations.weight_norm(projection)
        return model

    model = mixed()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    sum(parameter.float().square().sum() for parameter in model.parameters()).backward()
    optimizer.step()
    expected = weights(model)
    if rename:
        write = model.save_pretrained
        model.save_pretrained = lambda folder: write(
            folder, state_dict={k.replace(".parametrizations.", "."): v.clone() for k, v in model.state_dict().items()}
        )
    checkpoint.save(tmp_path / "a", model, optimizer, {})
    other = mixed()
    checkpoint.load(tmp_path / "a", other, torch.optim.AdamW(other.parameters(), lr=0.1))
    assert same(other, expected)
    kept = {name for name in checkpoint.load_file(tmp_path / "a" / "trainer.safetensors") if "parameter/" in name}
    assert all("parametrizations" in name for name in kept)  # what the model's files hold is not written twice
    assert bool(kept) == rename


def test_checksums_tell_bits_names_and_shapes():
    zeros = torch.zeros(2, 3)
    changed = [
        {"a": zeros.view(3, 2)},
        {"b": zeros},
        {"a": zeros.double()},
        {"a": -zeros},
        {"a": zeros, "c": torch.zeros(0)},
        {"a": torch.zeros(2, 3, dtype=torch.bfloat16)},
    ]
    assert len({resumption.checksum(tensors) for tensors in [{"a": zeros}, *changed]}) == 7
    assert resumption.checksum({"a": zeros.T.contiguous().T}) == resumption.checksum({"a": zeros})


def test_prompt_fingerprints_tell_what_is_asked_and_compared():
    from PIL import Image

    def of(prompt="a", **fields):
        return resumption.prompt_fingerprint([Request(prompt, **fields)])

    picture = Image.new("RGB", (2, 2))
    black, red = [picture], [Image.new("RGB", (2, 2), "red")]
    arrays = [np.zeros((2, 2, 3), np.uint8)], [np.ones((2, 2, 3), np.uint8)]
    files = [Path("x/a.png")], [Path("x/b.png")]
    different = [
        *(of(), of("b"), of([1, 2]), of(torch.tensor([1, 2, 3])), of(n=2), of(metadata={"answer": "1"})),
        *(of(images=images) for images in (black, red, *arrays, *files)),
        *(of(metadata={"facts": [["AB", value]]}) for value in "56"),
        *(of(prune=prune) for prune in (None, PruneConfig("strided"), PruneConfig("strided", 0.25))),
        resumption.prompt_fingerprint([]),
    ]
    assert len(set(different)) == len(different)
    assert of(images=[Path("/moved/a.png")]) == of(images=files[0])
    assert of(metadata={"own": object()}) == of(metadata={"own": object()})  # no address in it


def test_settings_that_a_resumed_run_must_repeat():
    constant, falling = GRPOConfig(max_steps=4), GRPOConfig(max_steps=4, schedule="linear")
    written = json.loads(json.dumps(resumption.settings_of(constant)))
    free = {"max_steps": 9, "save_every": 3, "eval_every": 2, "log_every": 5, "progress": "none", "tensorboard": True}
    resumption.check_settings(written, resumption.settings_of(GRPOConfig(**free, reward_workers=3)))
    with pytest.raises(ValueError, match=r"learning_rate = 1e-06, with which the run was begun, got 0.1 \(learning_ra"):
        resumption.check_settings(written, resumption.settings_of(GRPOConfig(max_steps=4, learning_rate=0.1)))
    longer = resumption.settings_of(GRPOConfig(max_steps=5, schedule="linear"))
    with pytest.raises(ValueError, match="max_steps = 4, with which the run was begun, got 5"):
        resumption.check_settings(resumption.settings_of(falling), longer)
    with pytest.raises(ValueError, match="ranks = 2"):
        resumption.check_settings({**written, "ranks": 2}, {**written, "ranks": 1})
