"""The first minutes at their smallest: the order of what is said, and its numbers a second way."""

import re

import pytest
import torch
from test_figures import cut_off, overlapping, smallest_text

import flow_matching as fm
from results import first_minutes

CAPTIONS = "|".join(first_minutes.FOUR)


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """(what is printed after eight steps of training, the picture's file)."""
    file = tmp_path_factory.mktemp("first") / "minutes.png"
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(first_minutes, "print", lines_into(lines), raising=False)
        first_minutes.main(str(file), steps=8, samples=5, noises=2)
    return "\n".join(lines), file


def lines_into(lines):
    def keep(*words, **_):
        lines.append(" ".join(map(str, words)))
    return keep


def test_the_equations_come_in_the_order_of_the_derivation(printed):
    numbers = [int(number) for number in re.findall(r"Eq\. (\d+)", printed[0])]
    assert numbers == sorted(numbers) == [1, 2, 3, 5, 6, 12, 15, 22]


def test_the_loss_falls_and_stays_above_its_floor(printed):
    floor = float(re.search(r"its floor\s+\(Eq\. 5\): (\S+)", printed[0])[1])
    losses = [float(loss) for loss in re.findall(r"the loss is (\S+)", printed[0])]
    assert len(losses) == 3 and losses[0] > losses[-1] > floor > 0


def test_a_small_step_changes_the_losses_as_M_says(printed):
    """To first order the step takes a hundredth of L: what M leaves out is small beside that."""
    pairs = re.findall(r"(\S+) predicted, (\S+) measured", printed[0])
    pairs += re.findall(r"L changes by (\S+)\n\(Eq\. 15\), and (\S+) is measured", printed[0])
    assert len(pairs) == 5
    for predicted, measured in pairs:
        assert float(measured) == pytest.approx(float(predicted), rel=0.2, abs=2e-3)
    predicted, measured = map(float, pairs[0])
    assert measured != pytest.approx(2 * predicted, rel=0.2)           # twin: twice the step


def test_who_helps_and_who_is_in_conflict_is_told_by_the_sign(printed):
    words = re.findall(rf"({CAPTIONS}) +(helps|conflict) +(\S+) predicted", printed[0])
    assert len(words) == 4 and words[0][1] == "helps"
    for _, word, predicted in words:
        assert (word == "conflict") == (float(predicted) > 0)


def test_what_is_held_out_is_never_trained_on():
    generator = torch.Generator().manual_seed(0)
    seen = first_minutes.some_scenes(500, generator).objects[:, 0, :3]
    held_out = first_minutes.some_scenes(500, generator, "held_out").objects[:, 0, :3]
    assert not set(map(tuple, seen.tolist())) & set(map(tuple, held_out.tolist()))


def test_M_is_the_product_of_the_mean_gradients_of_the_four_images():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = first_minutes.new_network().double()
    # At first the last layer is zero, and so would be most gradients.
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    batch, M = first_minutes.measure_matrix(model, generator, 2)
    r = fm.residual(model, *batch)
    halves = r.square().flatten(1).sum(1).view(4, 2).mean(1) / 2
    gradients = []
    for half in halves:
        g = torch.autograd.grad(half, model.parameters(), retain_graph=True, allow_unused=True,
                                materialize_grads=True)
        gradients.append(torch.cat([one.flatten() for one in g]))
    g = torch.stack(gradients)
    assert torch.allclose(M, g @ g.T, rtol=1e-9, atol=1e-9 * M.max().item())
    assert not torch.allclose(M, g @ g.flip(0).T, rtol=1e-3)


def test_the_picture_can_be_read_from_the_last_row(printed, tmp_path):
    assert printed[1].stat().st_size > 10_000
    black = torch.zeros(5, 3, 12, 12)
    longest = ["meso yellow checked triangle on white"] * 5
    figure = first_minutes.picture({"captions": longest, "truth": black, "images": black})
    # The layout is made when it is saved.
    figure.savefig(tmp_path / "picture.png")
    assert smallest_text(figure) >= 18
    assert cut_off(figure) == []
    assert overlapping(figure) == []
