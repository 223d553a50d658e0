"""The pictures of results/figures.py: their text is large enough, nothing of it is cut off or lies
on other text, and the numbers in them are right by a second route.

Pictures that need a training are drawn after a step or two. They then look different, and their
numbers have to be as right.
"""

import itertools

import matplotlib.image
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL.GifImagePlugin import GifImageFile

import flow_matching as fm
import ntk
import toy_data
from results import figure_paint as paint
from results import figures
from support.pictures import VIEW_COLOURS

CHEAPER = {"floor": {"scenes": 4, "pixels": 8, "levels": 3},
           "influence": {"steps": 1, "noises": 2, "pixels": 8},
           "step": {"steps": 1},
           "matrix": {"frames": (0, 1, 2, 3), "stills": (0, 1, 2, 3), "noises": 1}}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """(the figures by name, the folder of their files)."""
    folder = tmp_path_factory.mktemp("figures")
    found = {}
    for name in figures.PICTURES:
        found[name] = figures.draw(name, folder, **CHEAPER.get(name, {}))
    return found, folder


# --- Legible from the last row --------------------------------------------------------------------

def texts(figure):
    """The texts that can be seen."""
    unseen = numbers_beyond_an_axis(figure)
    found = figure.findobj(Text)
    return [text for text in found
            if text.get_visible() and text.get_text().strip() and text not in unseen]


def numbers_beyond_an_axis(figure):
    """The numbers that matplotlib keeps for an axis beyond its ends, and never draws."""
    beyond = []
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks() + axis.get_minor_ticks():
                if not low <= tick.get_loc() <= high:
                    beyond += [tick.label1, tick.label2]
    return beyond


def box_of(figure, text):
    return text.get_window_extent(FigureCanvasAgg(figure).get_renderer())


def smallest_text(figure):
    """The height of the smallest text in pixels, on a projector 1024 pixels wide."""
    width = figure.get_size_inches()[0] * figure.dpi
    heights = [text.get_fontsize() * figure.dpi / 72 for text in texts(figure)]
    return min(heights) * 1024 / width


def cut_off(figure):
    """The texts that reach beyond the edge of the figure, by more than a pixel."""
    width, height = figure.bbox.size
    found = []
    for text in texts(figure):
        box = box_of(figure, text)
        across = -1 <= box.x0 and box.x1 <= width + 1
        upright = -1 <= box.y0 and box.y1 <= height + 1
        if not (across and upright):
            found.append(text.get_text())
    return found


def overlapping(figure):
    """The pairs of texts that lie on each other, by more than two pixels both ways."""
    found = []
    boxes = [(text.get_text(), box_of(figure, text)) for text in texts(figure)]
    for (first, a), (second, b) in itertools.combinations(boxes, 2):
        common_width = min(a.x1, b.x1) - max(a.x0, b.x0)
        common_height = min(a.y1, b.y1) - max(a.y0, b.y0)
        if common_width > 2 and common_height > 2:
            found.append((first, second))
    return found


@pytest.mark.parametrize("name", figures.PICTURES)
def test_a_picture_can_be_read_from_the_last_row(drawn, name):
    figure = drawn[0][name]
    assert smallest_text(figure) >= 18
    assert cut_off(figure) == []
    assert overlapping(figure) == []


@pytest.mark.parametrize("name", figures.PICTURES)
def test_a_picture_fits_a_projector_and_is_saved(drawn, name):
    height, width, _ = matplotlib.image.imread(drawn[1] / f"{name}.png").shape
    assert width == 1024
    assert 500 <= height <= 768


def bad_figure(change):
    figure = Figure(figsize=(10.24, 7.68), dpi=100)
    axis = figure.subplots()
    axis.tick_params(labelsize=15)
    change(axis)
    figure.canvas.draw()
    return figure


def test_text_that_is_small_or_cut_off_or_covered_is_noticed():
    """The sabotaged twins."""
    good = bad_figure(lambda axis: axis.text(0.5, 0.5, "good", fontsize=15))
    assert smallest_text(good) >= 18 and cut_off(good) == [] and overlapping(good) == []
    small = bad_figure(lambda axis: axis.text(0.5, 0.5, "small", fontsize=12))
    assert smallest_text(small) < 18
    outside = bad_figure(lambda axis: axis.text(1.1, 0.5, "outside", fontsize=15))
    assert cut_off(outside) == ["outside"]

    def write_twice(axis):
        axis.text(0.5, 0.5, "one", fontsize=15)
        axis.text(0.51, 0.5, "two", fontsize=15)

    assert overlapping(bad_figure(write_twice)) == [("one", "two")]


def test_the_colours_of_the_granularities_are_the_same_everywhere():
    assert dict(zip(paint.GRANULARITIES, paint.COLOURS)) == VIEW_COLOURS


# --- The numbers ----------------------------------------------------------------------------------

def close(a, b, scale=1.0):
    """Whether two float64 results agree up to rounding."""
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    return (a - b).abs().max() <= 1000 * torch.finfo(torch.float64).eps * scale


def shown_numbers(axis):
    """The numbers written into the cells of a table."""
    words = [text.get_text().replace("−", "-") for text in axis.texts]
    return [float(word) for word in words if word.lstrip("-")[0].isdigit()]


def test_the_table_beside_the_arrows_holds_their_dot_products(drawn):
    measured = figures.measure_arrows()
    by_hand = []
    for (a, b), (c, d) in itertools.product(measured["g"].tolist(), repeat=2):
        by_hand.append(a * c + b * d)
    assert close(measured["M"].flatten(), torch.tensor(by_hand, dtype=torch.float64))
    table = shown_numbers(drawn[0]["arrows"].axes[1])
    assert table == [round(product, 2) for product in by_hand]
    # The twin: the picture must show a conflict, and gradients of other samples do not fit.
    assert min(table) < 0
    assert not close(measured["M"], measured["g"] @ measured["g"].flip(0).T)


def test_the_bowl_falls_along_the_mean_of_the_arrows():
    measured = figures.measure_arrows()
    side, bowl = measured["side"], measured["bowl"]
    # The bowl is quadratic: central differences at a point of the grid are exact, and the gradient
    # at theta follows from two of them by a straight line.
    h = side[1] - side[0]
    theta_1, theta_2 = measured["theta"]
    column = int(((theta_1 - side[0]) / h).round())
    row = int(((theta_2 - side[0]) / h).round())
    assert close(side[row], theta_2) and close(side[column], theta_1)
    slope = torch.stack([bowl[row, column + 1] - bowl[row, column - 1],
                         bowl[row + 1, column] - bowl[row - 1, column]]) / (2 * h)
    assert close(slope, measured["g"].mean(0), scale=1 / h)
    assert not close(slope, measured["g"].sum(0), scale=1 / h)


def test_the_one_cell_of_M_is_what_the_blocks_say(drawn):
    measured = figures.measure_jacobians()
    J, K, r, M = (measured[name] for name in "JKrM")
    blocks = torch.einsum("idp,jcp->ijdc", J, J)
    assert close(K, blocks, scale=10)
    assert close(M, torch.einsum("id,ijdc,jc->ij", r, blocks, r), scale=10)
    assert not close(M, torch.einsum("id,ijdc,ic->ij", r, blocks, r), scale=10)
    last = drawn[0]["jacobians"].axes[-1]
    assert shown_numbers(last) == [round(M[0, 1].item(), 1)]
    assert last.get_xlabel() == ("conflict" if M[0, 1] < 0 else "helps")


def test_the_quadratic_form_is_the_squared_length_of_the_black_arrow(drawn):
    form = fm.measure_groups()
    squared = (form["v"] - form["u_star"]).square().sum()
    weighted = form["omega"] @ form["Omega"] @ form["omega"]
    assert close(squared, weighted, scale=10)
    assert close(form["omega"] @ form["u_g"], form["u_star"], scale=10)
    assert not close(squared, form["omega"] @ form["Omega"].diagonal(), scale=10)
    assert f"= {squared.item():.2f} = |v − u*|²" in drawn[0]["form"].axes[1].get_xlabel()
    # The numbers that the picture shows add up themselves.
    shown = [round(term, 2) for term in
             (form["omega"][:, None] * form["Omega"] * form["omega"]).flatten().tolist()]
    assert sum(shown) == pytest.approx(round(squared.item(), 2))


def test_the_floor_at_noise_alone_is_the_spread_of_the_populations():
    """At t = 1 nothing is seen of x0, and u* is off by x0 - mean, whatever the noise. The mean of
    its square over a caption's images is their variance."""
    floors = figures.measure_floor(scenes=150, pixels=8, levels=2)
    # Its first scenes are known here, those of macro. Some of their captions come twice.
    scenes = toy_data.sample_scenes(150, torch.Generator().manual_seed(0), "target")
    points, _ = toy_data.views(toy_data.population(scenes), "macro", 8)
    variance = points.unflatten(0, (150, 18)).double().var(1, correction=0).mean()
    assert floors["macro"][-1] == pytest.approx(variance.item(), rel=1e-5)


def test_distinct_captions_stand_for_all_scenes():
    scenes = toy_data.sample_scenes(60, torch.Generator().manual_seed(1), "target")
    for name in toy_data.GRANULARITIES:
        chosen, share = figures.distinct_captions(scenes, name)
        _, tokens = toy_data.views(scenes, name, 8)
        same = (tokens[chosen][:, None] == tokens).all(2)              # (captions, 60)
        assert (same.sum(0) == 1).all()
        assert torch.allclose(share, same.float().mean(1))


def test_M_under_each_image_is_the_product_of_its_mean_gradients():
    measured = figures.measure_influence(steps=1, noises=2, pixels=8)
    model = figures.trained_unet(1, 8, 0.9)
    x0, tokens = figures.measured_views(8)
    e = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    gradients = []
    for image, words in zip(x0, tokens):
        model.zero_grad()
        batch = (image.expand(2, -1, -1, -1), e, 0.9, words.expand(2, -1))
        # The gradient of the mean of |r|^2 / 2.
        (fm.residual(model, *batch).square().sum() / 4).backward()
        g = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        gradients.append(torch.cat(g))
    products = torch.stack(gradients) @ gradients[0]
    assert torch.allclose(measured["M"], products, rtol=1e-3, atol=1e-4 * products[0].item())
    assert not torch.allclose(measured["M"], products.flip(0), rtol=1e-3)
    assert torch.allclose(measured["shares"].sum((1, 2)), measured["M"])


def test_what_a_step_adds_is_what_a_real_step_adds():
    """The second route: the network is changed by a small step, and asked again."""
    measured = figures.measure_influence(steps=1, noises=2, pixels=8)
    model = figures.trained_unet(1, 8, 0.9).double()
    x0, tokens = figures.measured_views(8)
    e = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    x0, e = x0.repeat_interleave(2, 0).double(), e.repeat(4, 1, 1, 1).double()
    tokens, t = tokens.repeat_interleave(2, 0), torch.full((8,), 0.9, dtype=torch.float64)
    x_t = fm.path(x0, e, t)

    def predicted():
        with torch.no_grad():
            x0_predicted = x_t - 0.9 * model(x_t, t, tokens)
        return x0_predicted.unflatten(0, (4, 2)).mean(1)

    before, eta = predicted(), 1e-6
    of_the_first = [z[:2] for z in (x0, e, t, tokens)]
    loss = fm.residual(model, *of_the_first).square().sum() / 4
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= eta * p.grad
    added = ((predicted() - before) / eta).float()
    allowed = 0.01 * added.abs().max()
    assert (measured["added"] - added).abs().max() <= allowed
    assert (measured["added"] + added).abs().max() > allowed


def test_the_predicted_line_leaves_the_measured_one_as_the_square_of_the_step():
    step = figures.measure_step(steps=1)
    eta, measured, predicted = (torch.tensor(step[name], dtype=torch.float64)
                                for name in ("eta", "measured", "predicted"))
    gap = (measured - predicted)[:4]
    # Twice the step makes four times the gap: a slope of 2 in logarithms.
    slope = torch.log(gap[3] / gap[0]) / torch.log(eta[3] / eta[0])
    assert abs(slope - 2) < 0.1
    assert abs(gap[0] / predicted[0]) < 0.05


def test_the_common_direction_goes_first():
    film = figures.measure_matrix(frames=(0, 10), noises=2)
    before, after = film[0]["cosines"], film[-1]["cosines"]
    share = paint.share_of_light_against_dark(before)
    assert share > paint.share_of_light_against_dark(after) + 0.1
    # At first no other pattern of light and dark has much more: two roots on white, two on black.
    values, vectors = torch.linalg.eigh(before)
    light, dark = vectors[:, -1].view(2, 6).mean(1)
    assert light * dark < 0
    assert 0.9 * values[-1] / len(before) < share <= values[-1] / len(before) + 1e-6


def test_opposite_gradients_have_all_and_gradients_at_right_angles_the_least():
    signs = torch.tensor([1.0, 1.0, -1.0, -1.0])
    assert paint.share_of_light_against_dark(torch.outer(signs, signs)) == pytest.approx(1)
    assert paint.share_of_light_against_dark(torch.ones(4, 4)) == pytest.approx(0)
    assert paint.share_of_light_against_dark(torch.eye(4)) == pytest.approx(1 / 4)


def test_a_still_shows_the_cosines_of_M():
    cheaper = CHEAPER["matrix"]
    shot, *_ = figures.measure_matrix(frames=cheaper["frames"], noises=cheaper["noises"])
    with matplotlib.rc_context(paint.LARGE_TYPE):
        axis = Figure().subplots()
        paint.paint_shot(axis, shot)
    shown = torch.tensor(axis.images[0].get_array().data)
    assert torch.equal(shown, shot["cosines"])
    assert torch.allclose(shown.diagonal(), torch.ones(12))


def test_the_readme_says_the_floor_as_it_is_drawn():
    floors = figures.measure_floor(levels=1)
    half, noisy = [], []
    for name in toy_data.GRANULARITIES:
        _, at_half, _, at_much_noise = floors[f"{name} marked"]
        half.append(f"{paint.short(at_half)} ({name})".removeprefix("0"))
        noisy.append(paint.short(at_much_noise).removeprefix("0"))
    page = (figures.ROOT / "README.md").read_text(encoding="utf-8")
    assert f"at t = .5 is {', '.join(half)}, at t = .95 {', '.join(noisy)}." in page


# --- The command ----------------------------------------------------------------------------------

def test_the_animation_has_a_frame_for_each_step_and_is_small(drawn):
    with GifImageFile(drawn[1] / "matrix.gif") as film:
        assert film.n_frames == len(CHEAPER["matrix"]["frames"])
    assert (figures.FOLDER / "matrix.gif").stat().st_size < 1_000_000


def test_the_command_draws_a_picture_and_refuses_an_unknown_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    figures.main("weights", "views")
    assert capsys.readouterr().out.split() == ["drawn:", "weights.png", "drawn:", "views.png"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["views.png", "weights.png"]
    with pytest.raises(SystemExit, match="no picture 'from'; the pictures are: crossing, arrows"):
        figures.main("from")


def test_every_picture_of_the_command_lies_in_its_folder():
    for name in figures.PICTURES:
        assert (figures.FOLDER / f"{name}.png").stat().st_size > 10_000
