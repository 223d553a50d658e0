"""The race against public networks is fair: turns alternate, the ratio is that of the clock, and both sides are of one size."""

import importlib.util
import sys

import pytest
import torch

import side_by_side
import train


def test_without_the_other_side_it_says_in_one_sentence_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert side_by_side.main(["--device", "cpu"]) is None          # what sys.exit takes for success
    said = capsys.readouterr().out
    assert "pip install diffusers" in said and said.count("\n") == 1


def test_the_turns_alternate_and_give_the_known_ratio():
    now, calls, slow = 0.0, [], iter([1.0, 1.0, 50.0, 1.0, 1.0, 1.0])

    def spend(name, seconds):
        nonlocal now
        now += seconds
        calls.append(name)
    ours, theirs = lambda: spend("ours", 2.0), lambda: spend("theirs", 6.0 * next(slow))
    assert side_by_side.in_turns(ours, theirs, rounds=3, calls=2, clock=lambda: now) == (2, 6, [3, 3, 76.5])   # one call was disturbed
    assert calls == 2 * ["ours"] + 4 * ["theirs"] + 4 * ["ours"] + 2 * ["theirs"]


@pytest.mark.parametrize("model", ["dit", "unet"])
def test_both_sides_map_to_a_velocity_and_have_as_many_parameters(model):
    s = train.Settings(model=model, width=48, pixels=8, depth=2, batch=2)
    assert side_by_side.flops(side_by_side.training_step(train.build(s), s)) > 0
    if not importlib.util.find_spec("diffusers"):
        return
    ours, theirs, _ = side_by_side.pair(s)
    x, t, tokens = torch.randn(2, 3, 8, 8), torch.rand(2), torch.randint(1, 20, (2, 12))
    assert ours(x, t, tokens).shape == theirs(x, t, tokens).shape == x.shape
    assert side_by_side.size(theirs) == pytest.approx(side_by_side.size(ours), rel=0.05)
    side_by_side.training_step(theirs, s)()
    assert all(p.grad is not None for p in theirs.parameters())    # all that is counted is trained
