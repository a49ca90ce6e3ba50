"""What the demo's report says about pruning: counted from the pictures' pixels and from plans of single scenes."""

from __future__ import annotations

import base64
import io
import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from foveate.rollout.config import EngineConfig
from foveate.rollout.demo import gallery, pruning, tasks
from foveate.rollout.demo.gallery import keeps
from foveate.rollout.demo.model import make_model, make_processor
from foveate.rollout.demo.options import pruning_by
from foveate.rollout.demo.record import DemoRecord, PrunedRun, PrunedSite, PruningView
from foveate.rollout.demo.report import render
from foveate.rollout.demo.scenes import scene_stream
from foveate.rollout.demo.tasks import evaluate, make_request, make_reward
from foveate.rollout.engine import Engine
from foveate.rollout.pruning import METHODS


@pytest.fixture(scope="module", autouse=True)
def short_replies():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "MAX_TOKENS", 2)
        yield


@pytest.fixture(scope="module")
def scenes():
    return list(itertools.islice(scene_stream("held-out", 0), 16))


@pytest.fixture(scope="module")
def engine():
    return Engine(make_model(0), make_processor(), EngineConfig(kv_memory=1 << 23))


@pytest.fixture(scope="module")
def view(engine, scenes):
    return pruning.look_at_pruning(engine, make_processor(), scenes, make_reward())


def quarters(image):
    """float [height, width, ...] -> its four quarters in raster order."""
    return [part for half in np.split(np.asarray(image), 2) for part in np.split(half, 2, axis=1)]


def has_ink(scene):
    return [bool(quarter.any()) for quarter in quarters(scene.image.convert("L"))]


def test_flags_and_shares_are_those_of_each_scene_alone(engine, scenes, view):
    inked = np.array([has_ink(scene) for scene in scenes])
    assert inked.sum() == sum(len(scene.digits) for scene in scenes)
    assert view.most_digits == pytest.approx(np.minimum(inked.sum(1), 2).sum() / inked.sum())
    assert list(view.shown) == [index for index, row in enumerate(inked) if row.sum() == 2][:8]
    assert [run.method for run in view.runs] == list(METHODS)
    for run in view.runs:
        single = Engine(engine.model, make_processor(), replace(engine.config, prune=pruning_by(run.method)))
        kept = np.zeros((len(run.sites), len(scenes), 4), dtype=bool)
        for index, scene in enumerate(scenes):
            (group,) = single.generate([make_request(scene, temperature=0.0)], strict=True)
            for place, site in enumerate(group.keep.sites):
                kept[place, index, site.kept.tolist()] = True
        for site, flags in zip(run.sites, kept, strict=True):
            assert (flags.sum(1) == site.tokens).all()
            assert site.digits == pytest.approx((flags & inked).sum() / inked.sum())
            assert [list(quarter) for quarter in site.kept] == flags[list(view.shown)].tolist()


def test_accuracies_are_those_of_an_evaluation(engine, scenes):
    """A random model answers nothing right, so the reward is stood in for by one that likes odd ids."""

    class Reward:
        def __call__(self, group):
            value = float(group.rollouts[0].token_ids[0] % 2)
            return type("Table", (), {"parts": {n: [value] for n in ("accuracy", "perception", "format")}})

    found = pruning.look_at_pruning(engine, make_processor(), scenes, Reward())
    assert found.accuracy == evaluate(engine, scenes, Reward()).accuracy
    for run in found.runs:
        single = Engine(engine.model, make_processor(), replace(engine.config, prune=pruning_by(run.method)))
        assert run.accuracy == evaluate(single, scenes, Reward()).accuracy
    assert len({run.accuracy for run in found.runs}) > 1


def test_dropped_quarters_are_faded_and_kept_ones_are_not(scenes):
    flags = (True, False, False, True)
    site = PrunedSite(2, 2, 0.25, (flags,))
    record = DemoRecord(0, 1, 2, 2, scenes, [])
    drawn = keeps(record, PruningView((5,), 0.5, 0.75, (PrunedRun("fastv", 0.125, (site,)),)))
    whole, faded = (
        Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"data:image/png;base64,([^\"]+)", drawn)
    )
    assert (np.asarray(whole.convert("L")) == np.asarray(scenes[5].image.convert("L"))).all()
    alphas = [np.unique(quarter).tolist() for quarter in quarters(faded.getchannel("A"))]
    assert alphas == [[255] if flag else [gallery.FADED] for flag in flags]
    assert np.unique(whole.getchannel("A")).tolist() == [255]
    assert (np.asarray(faded.getchannel("L")) == np.asarray(scenes[5].image.convert("L"))).all()
    assert "from layer 2 on<br>2 of 4 tokens, <b>25%</b> of the digits" in drawn
    assert "<b>12.5%</b> answered right" in drawn
    assert 'title="kept: top-left, bottom-right"' in drawn


def test_the_section_is_there_when_pruning_was_looked_at(scenes, view):
    from foveate.rollout.demo.record import Arm
    from foveate.rollout.demo.tasks import Evaluation

    result = Evaluation(("",) * len(scenes), (False,) * len(scenes), 0.0, 0.0)
    record = DemoRecord(0, 1, 2, 2, scenes, [], arms=[Arm("a", evaluations=[(0, result)])])
    plain = render(record)
    record.pruning = view
    assert "What pruning keeps" not in plain
    told = render(record)
    assert f"room for {view.most_digits:.0%} of the digits" in told
    assert told.count("<img") == plain.count("<img") + len(view.shown) * (1 + sum(len(run.sites) for run in view.runs))
