"""Checkpoints that a crash or another run cannot tear."""

import json
import os

import pytest
import torch

from foveate.rollout import checkpoint
from foveate.rollout.testing import tiny_model


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
    save_file({k: v for k, v in tensors.items() if k != "rng/cpu"}, directory / "trainer.safetensors")
    return trained()


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
    assert json.loads((tmp_path / "a" / "trainer.json").read_text()) == {"optimizer": "AdamW", "state": {"step": 3}}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
