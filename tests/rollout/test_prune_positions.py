"""Pruned tokens keep the positions they had: what the decoder rotates by, layer by layer, in a model of bfloat16."""

from __future__ import annotations

import pytest
import torch

from foveate.rollout.config import PruneConfig
from foveate.rollout.models.decoder import Decoder
from foveate.rollout.testing import tiny_model

CONFIGS = [
    PruneConfig("visionzip", 0.5),
    PruneConfig("random", 0.25),
    PruneConfig("fastv", 0.4, layer=1),
    PruneConfig("pyramiddrop", 0.6),
]
TEXT = "word " * 60  # a token a byte: the image stands where bfloat16 holds no odd number
NEW_TOKENS = 4


@pytest.fixture
def seen(monkeypatch):
    """Positions that the decoder is given, and by what its runs of layers rotate: (first layer, cosines)."""
    positions, runs = [], []
    rotary, run = Decoder.rotary, Decoder.run

    def note_positions(self, given, dtype):
        positions.append(given)
        return rotary(self, given, dtype)

    def note_run(self, layers, hidden, angles, *arguments, **options):
        runs.append((layers.start, angles[0][:, 0]))
        return run(self, layers, hidden, angles, *arguments, **options)

    monkeypatch.setattr(Decoder, "rotary", note_positions)
    monkeypatch.setattr(Decoder, "run", note_run)
    return positions, runs


def cosines(model, positions: torch.Tensor) -> torch.Tensor:
    """float64 [T, head_dim] of positions [3, T]: each of the module's frequencies turns with its section's plane."""
    sections = torch.tensor(model.config.get_text_config().rope_parameters["mrope_section"])
    planes = torch.repeat_interleave(torch.arange(3), sections)
    frequencies = model.model.language_model.rotary_emb.inv_freq.double()
    return (positions[planes].double().t() * frequencies).cos().repeat(1, 2)


def rows_left(group, image_token_id: int, layer: int) -> list[int]:
    """Prompt rows that a layer still sees."""
    places = (group.prompt_ids == image_token_id).nonzero().flatten().tolist()
    kept = [site.kept.tolist() for site in group.keep.sites if site.layer <= layer]
    gone = {place for own in kept for token, place in enumerate(places) if token not in own}
    return [row for row in range(len(group.prompt_ids)) if row not in gone]


@pytest.mark.parametrize("size", [(56, 168), (168, 56), (112, 112)], ids=["wide", "tall", "square"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.method)
def test_every_layer_rotates_by_the_models_own_positions(config, size, make_engine, chat, picture, seen):
    positions, runs = seen
    model = tiny_model("qwen2_5_vl", num_hidden_layers=4, dtype=torch.bfloat16)
    request = chat(TEXT, [picture(*size)], system=None, max_tokens=NEW_TOKENS, ignore_eos=True)
    request.prompt[0]["content"].reverse()  # the text first
    (group,) = make_engine(model, prune=config).generate([request], strict=True)
    ids = torch.cat([group.prompt_ids, group.rollouts[0].token_ids])[None]
    is_image = (ids == model.config.image_token_id).int()
    full, _ = model.model.get_rope_index(ids, mm_token_type_ids=is_image, image_grid_thw=group.image_grid_thw)
    full, prompt = full[:, 0], len(group.prompt_ids)
    assert int(full[:, is_image[0].bool()].min()) > 256

    assert {given.dtype for given in positions} == {torch.int64}
    plan = group.keep
    assert (plan.positions.dtype, group.prompt_positions.dtype) == (torch.int32, torch.int32)
    entering = rows_left(group, model.config.image_token_id, 0)
    assert plan.positions.tolist() == positions[0].tolist() == full[:, entering].tolist()
    assert full[:, prompt].tolist() == [plan.next_position] * 3

    starts = sorted({0, *(site.layer for site in plan.sites)})
    expected = [(start, rows_left(group, model.config.image_token_id, start)) for start in starts]
    expected += [(0, [prompt + step]) for step in range(NEW_TOKENS - 1)]
    assert len(expected[len(starts) - 1][1]) < prompt
    assert [start for start, _ in runs] == [start for start, _ in expected]
    for (_, cos), (_, rows) in zip(runs, expected, strict=True):
        # Cosines of float32 angles, whose error is that of numbers up to 512, rounded to bfloat16.
        torch.testing.assert_close(cos.double(), cosines(model, full[:, rows]), rtol=2**-8, atol=2**-15 + 2**-9)
