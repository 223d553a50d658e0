"""The race against public networks is fair: turns alternate, the ratio is that of the clock, and
both sides are of one size.
"""

import importlib.util
import sys

import pytest
import torch

import train
from results import side_by_side


def test_without_the_other_side_it_says_in_one_sentence_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    side_by_side.main(["--device", "cpu"])
    said = capsys.readouterr().out
    assert "pip install diffusers" in said and said.count("\n") == 1


def test_the_turns_alternate_and_give_the_known_ratio():
    now, calls = [0.0], []
    # One of their six calls is disturbed. The median must not see it.
    their_seconds = iter([6.0, 6.0, 300.0, 6.0, 6.0, 6.0])

    def ours():
        now[0] += 2.0
        calls.append("ours")

    def theirs():
        now[0] += next(their_seconds)
        calls.append("theirs")

    found = side_by_side.in_turns(ours, theirs, rounds=3, calls=2, clock=lambda: now[0])
    assert found == (2, 6, [3, 3, 76.5])
    assert calls == 2 * ["ours"] + 4 * ["theirs"] + 4 * ["ours"] + 2 * ["theirs"]


def test_flops_are_those_of_the_closed_form():
    N, C, hidden = 5, 8, 16
    network = torch.nn.Sequential(torch.nn.Linear(C, hidden), torch.nn.Linear(hidden, C))
    x = torch.randn(N, C)

    def forward():
        return network(x).sum()

    def step():
        forward().backward()

    product = 2 * N * C * hidden
    assert side_by_side.flops(forward) == 2 * product
    # Backward each layer has two products, but the first layer's input needs no gradient.
    assert side_by_side.flops(step) == 2 * product + 3 * product


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
    # All that is counted is trained.
    assert all(weight.grad is not None for weight in theirs.parameters())
