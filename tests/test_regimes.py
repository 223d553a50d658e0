"""The second study: its predictions against gradients, its yardsticks, and its bookkeeping."""

import concurrent.futures
import itertools
import json

import pytest
import torch

import flow_matching as fm
import ntk
import sga
import toy_data
import train
from results import prediction, ranks, regimes, regimes_report, step_noise, yardsticks
from support import report

TINY = {"pixels": 8, "width": 24, "depth": 1, "batch": 4, "pretrain_steps": 2, "roots": 4,
        "eval_images": 6, "sample_steps": 1, "warmup": 2, "smallest_object": 0.24}


def begun(**changes):
    run = train.Run(train.Settings(**TINY | {"tuples": 2, "finetune_steps": 6} | changes))
    run.step = run.settings.pretrain_steps
    run.begin_finetuning()
    # The last layer begins at zero, where most gradients vanish.
    torch.manual_seed(0)
    for weight in run.model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.2)
    return run


# --- Predictions: M against gradients -------------------------------------------------------------

def rand(*shape):
    generator = torch.Generator().manual_seed(len(shape))
    return torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1


def test_the_expected_square_of_a_step_is_that_of_every_possible_step():
    """Eq. 23: three views with two noises each; a step may hold a view twice, with both noises."""
    G = rand(3, 2, 7)                                                  # (V, 2, P)
    own = G.square().sum(2).mean(1)
    between = G.mean(1) @ G.mean(1).T
    between = between.diagonal_scatter((G[:, 0] * G[:, 1]).sum(1))
    once = (torch.tensor([0, 1]), torch.tensor([0.5, 0.3]))
    twice = (torch.tensor([2, 1, 2]), torch.tensor([0.2, 0.4, 0.1]))

    steps, means = [], []
    for first, second in itertools.product((0, 1), repeat=2):
        steps.append(0.5 * G[0, first] + 0.3 * G[1, second])
        steps.append(0.2 * G[2, first] + 0.4 * G[1, second] + 0.1 * G[2, 1 - first])
    for views, a in (once, twice):
        means.append(a.double() @ G.mean(1)[views])
    square, _ = prediction.expected_squares([once, twice], own, between)
    every = torch.stack(steps).square().sum(1).mean().item()
    assert square == pytest.approx(every, rel=1e-6)
    forgotten, _ = prediction.expected_squares([once, twice], between.diagonal(), between)
    assert forgotten != pytest.approx(every, rel=1e-2)                 # twin: without own noise

    # The mean of a step: where no view comes twice it is that of the views' means.
    _, mean_square = prediction.expected_squares([once], own, G.mean(1) @ G.mean(1).T)
    assert mean_square == pytest.approx(means[0].square().sum().item(), rel=1e-6)


def gradients_of(run, inputs, r, weight):
    """(N, P) one backward pass for each sample."""
    trained = [p for p in run.model.parameters() if p.requires_grad]
    rows = []
    for k in range(len(weight)):
        v = run.model(*[z[k:k + 1] for z in inputs])
        found = torch.autograd.grad(v, trained, r[k:k + 1] * weight[k], allow_unused=True,
                                    materialize_grads=True)
        rows.append(torch.cat([part.flatten() for part in found]))
    return torch.stack(rows)


@pytest.mark.parametrize("arm", ["sga", "min_snr", "global"])
def test_the_products_and_rates_are_those_of_the_gradients(arm):
    """Eq. 22, 23: adapters, noise levels and weights included."""
    run = begun(arm=arm, rank=2)
    G = gradients_of(run, *prediction.samples_of(run, run.arm, 2, 2)).unflatten(0, (-1, 2))
    own, between = prediction.own_and_between(run, run.arm, 2)
    scale = own.max()
    assert (own - G.square().sum(2).mean(1)).abs().max() < 1e-4 * scale
    apart = (G[:, 0] * G[:, 1]).sum(1)
    by_hand = (G.mean(1) @ G.mean(1).T).diagonal_scatter(apart)
    assert (between - by_hand).abs().max() < 1e-4 * scale

    plain = prediction.samples_of(run, sga.ARMS["baseline"], 2, 4)
    G_plain = gradients_of(run, *plain).unflatten(0, (-1, 2)).mean(1)  # (V, P)
    expected = 0.0
    for views, a in run.plan:
        expected = expected + a.float() @ G.mean(1)[views] / len(run.plan)
    rates = prediction.rates_by_view(run, run.arm, run.plan, 2)
    for index, view in enumerate(prediction.VIEWS):
        rate = G_plain[run.granularity == index].mean(0) @ expected
        assert rates[view] == pytest.approx(rate.item(), abs=1e-4 * scale.item())


def test_the_arm_decides_the_noise_levels_and_weights_of_a_prediction():
    run = begun()

    def medians(arm):
        inputs, _, _ = prediction.samples_of(run, sga.method(arm, "dit"), 100, 2)
        granularity = run.granularity.repeat_interleave(100)
        return [inputs[1][granularity == index].median().item() for index in range(3)]

    macro, _, micro = medians("offsets")
    assert macro > medians("baseline")[0] > micro
    weight = prediction.samples_of(run, sga.ARMS["min_snr"], 20, 2)[2]
    assert weight.min() < 0.9 and weight.max() == 1


def test_a_prediction_mixes_offsets_and_drops_captions_as_the_arm_does():
    """Eq. 19: the medians sigmoid(mu), or for "global" one and the same for all views."""
    run = begun(roots=12)

    def drawn(arm):
        (_, t, tokens), _, _ = prediction.samples_of(run, sga.method(arm, "dit"), 100, 2)
        granularity = run.granularity.repeat_interleave(100)
        medians = [t[granularity == index].median().item() for index in range(3)]
        return medians, (tokens == 0).all(1).float().mean().item()

    medians, null = drawn("offsets")
    assert medians == pytest.approx([0.622, 0.5, 0.378], abs=0.04)
    assert null == pytest.approx(run.settings.caption_dropout, abs=0.03)
    mixed, _ = drawn("global")
    assert max(mixed) - min(mixed) < 0.1 < max(medians) - min(medians)


def test_the_square_of_drawn_steps_is_the_predicted_one():
    """Eq. 23: the gradients of the steps that training would take, against M."""
    run = begun(rank=2, tuples=1, finetune_steps=150)
    weights = [weight.clone() for weight in run.model.parameters()]
    found = step_noise.look(run, "min_snr", 150, 30)
    # The prediction is a mean over 30 samples of each view, and scatters about as much.
    allowed = 6 * found["standard_error"]
    assert abs(found["predicted"] - found["measured"]) < allowed < 0.5 * found["measured"]
    assert found["mean_square"] < found["measured"]
    unscaled = found["predicted"] * (3 * 8**2 / 2) ** 2
    assert abs(unscaled - found["measured"]) > allowed                 # twin: unscaled
    assert all(torch.equal(one, other) for one, other in zip(weights, run.model.parameters()))


# --- Yardsticks -----------------------------------------------------------------------------------

def test_the_fit_is_zero_for_the_network_that_remembers_its_images():
    """The exact velocity of the roots' own images, in place of the network."""
    run = begun()
    s = run.settings
    for view in yardsticks.VIEWS:
        held = yardsticks.training_set(run, view, s)
        x0, e, t, tokens, u_star = held
        own = run.root[run.granularity == yardsticks.VIEWS.index(view)]
        images, words = toy_data.views(run.roots.take(own), view, s.pixels)

        def memory(x, t, tokens):
            rows = []
            for one, level, caption in zip(x, t, tokens):
                same = images[(words == caption).all(1)]
                rows.append(fm.exact_velocity(one[None], level[None], same)[0])
            return torch.stack(rows)

        errors = yardsticks.errors_by_third(memory, held, s)
        assert max(errors) < 1e-8
        assert max(yardsticks.errors_by_third(run.ema, held, s)) > 0.1  # twin
        assert (fm.path(x0, e, t).shape, len(u_star)) == (x0.shape, s.eval_images)


def test_all_yardsticks_are_numbers_in_their_range():
    run = begun()
    found = yardsticks.measure(run, run.settings)
    assert set(found["fit"]) == set(yardsticks.VIEWS)
    assert len(found["generalisation"]) == 6 and len(found["reader"]) == 12
    for shares in found["reader"].values():
        assert set(shares) == set(yardsticks.READ)
        assert all(0 <= share <= 1 for share in shares.values())
        assert shares["joint"] <= min(shares.values()) + 1e-9


def test_the_thirds_go_from_data_to_noise():
    """A velocity t in place of u* = 0 has the error t^2: its mean over each third of [0, 1]."""
    run = begun(eval_images=60)
    for view in yardsticks.VIEWS:
        x0, e, t, tokens, u_star = yardsticks.training_set(run, view, run.settings)

        def network(x, t, tokens):
            return t[:, None, None, None].expand_as(x)

        held = x0, e, t, tokens, torch.zeros_like(u_star)
        errors = yardsticks.errors_by_third(network, held, run.settings)
        # The integral of t^2 over a third of [0, 1], times 3.
        assert errors == pytest.approx([1 / 27, 7 / 27, 19 / 27], abs=1e-3)


def test_each_yardstick_is_of_the_split_and_the_guidance_that_it_names(monkeypatch):
    run, seen = begun(), {}

    def no_network(network, tokens, s, generator):
        seen.setdefault(s.guidance, []).append({tuple(caption) for caption in tokens.tolist()})
        return torch.zeros(len(tokens), 3, s.pixels, s.pixels)

    def one_value(network, held, s):
        return {tuple(caption) for caption in held[3].tolist()}

    monkeypatch.setattr(report, "sample_images", no_network)
    monkeypatch.setattr(yardsticks, "errors_by_third", one_value)
    found = yardsticks.measure(run, run.settings)
    own = {}
    for index, view in enumerate(yardsticks.VIEWS):
        _, words = toy_data.views(run.roots.take(run.root[run.granularity == index]), view, 8)
        own[view] = {tuple(caption) for caption in words.tolist()}
        assert found["fit"][view] <= own[view]
    macro = own["macro"]
    assert found["generalisation"]["seen macro"] <= macro
    assert not found["generalisation"]["held_out macro"] & macro
    assert list(seen) == list(yardsticks.GUIDANCE)
    for of_scale in seen.values():                      # three views, seen and held out by turns
        assert of_scale[0] <= macro and not of_scale[1] & macro


# --- The bookkeeping ------------------------------------------------------------------------------

@pytest.fixture
def tiny_study(tmp_path, monkeypatch):
    """The study at its smallest, with bases that are made here."""
    monkeypatch.setattr(regimes, "BASES", tmp_path)
    monkeypatch.setattr(regimes, "ROWS", tmp_path / "rows.jsonl")
    sizes = {name: TINY[name] for name in ("pixels", "width", "depth", "eval_images",
                                           "sample_steps")}
    monkeypatch.setattr(regimes, "SIZE", sizes)
    tiny = {"pretrain_steps": 2, "batch": 4}
    monkeypatch.setattr(regimes, "PRETRAINING", {"dit": tiny, "unet": tiny})
    monkeypatch.setattr(regimes, "FINETUNING", {"roots": 4, "probe": 1, "warmup": 2})
    monkeypatch.setattr(regimes, "TUPLES", 24)
    for views in ("all", "macro"):
        folder = tmp_path / f"dit-{views}"
        folder.mkdir()
        run = train.Run(train.Settings(pretrain_views=views, **sizes, **tiny))
        run.step = 2
        run.save(str(folder / "pretrained.pt"))
    return regimes


@pytest.mark.parametrize("regime", regimes.REGIMES)
def test_a_regime_decides_its_settings_and_all_see_as_many_tuples(tiny_study, regime):
    s = tiny_study.settings_of(regime, "dit", "sga-short", 1, 1e-3)
    for name, value in regimes.REGIMES[regime].items():
        assert getattr(s, name) == value
    assert s.finetune_steps * s.tuples == 16 and s.arm == "sga"
    run = tiny_study.begin(s)
    trained = sum(weight.numel() for weight in run.model.parameters() if weight.requires_grad)
    all_weights = sum(weight.numel() for weight in run.model.parameters())
    assert (trained == all_weights) == (s.rank == 0)


def test_only_a_short_arm_sees_two_thirds_of_the_tuples(tiny_study):
    for arm, tuples in {"sga": 24, "baseline": 24, "sga-short": 16}.items():
        for regime in regimes.REGIMES:
            s = tiny_study.settings_of(regime, "dit", arm, 1, 1e-3)
            assert s.finetune_steps * s.tuples == tuples
            assert s.every == 24 // s.tuples // 3


def test_a_run_has_a_row_with_all_that_was_measured_and_is_repeatable(tiny_study):
    row = tiny_study.run_once("eight_tuples", "dit", "sga-short", 1, 1e-3)
    assert tiny_study.key_of(row) == ("eight_tuples", "dit", "sga-short", 1, 1e-3)
    assert row["predicted"]["square"] > 0
    assert len(row["log"]) >= 2 and len(row["probe"]) >= 2
    assert json.loads(json.dumps(row))["predicted"] == row["predicted"]
    again = tiny_study.run_once("eight_tuples", "dit", "sga-short", 1, 1e-3)
    assert again["generalisation"] == row["generalisation"]


def test_the_rate_is_chosen_on_the_baseline_of_the_choosing_seed(tiny_study):
    def row(arm, seed, rate, error):
        errors = {f"seen {view}": [error] * 3 for view in yardsticks.VIEWS}
        return {"regime": "paper", "model": "dit", "arm": arm, "seed": seed, "rate": rate,
                "generalisation": errors}

    choosing = regimes.CHOOSING_SEED
    rows = [row("baseline", choosing, 1e-3, 0.3), row("baseline", choosing, 3e-3, 0.2),
            row("sga", choosing, 1e-2, 0.1), row("baseline", 1, 1e-2, 0.1)]
    assert tiny_study.chosen_rate(rows, "paper", "dit") == 3e-3


def test_what_has_a_row_is_not_run_again(tiny_study):
    class Pool:
        """Notes what it is asked to run."""

        def __init__(self):
            self.keys = []

        def submit(self, function, *key):
            self.keys.append(key)
            future = concurrent.futures.Future()
            names = ("regime", "model", "arm", "seed", "rate")
            future.set_result(dict(zip(names, key)) | {"seconds": 1.0})
            return future

    keys = [("paper", "dit", "sga", seed, 1e-3) for seed in (1, 2)]
    first, second = Pool(), Pool()
    for pool, wanted in ((first, keys[:1]), (second, keys)):
        tiny_study.run_missing(wanted, tiny_study.key_of, tiny_study.run_once, tiny_study.ROWS,
                               pool)
    assert first.keys == keys[:1] and second.keys == keys[1:]
    assert sorted(map(tiny_study.key_of, tiny_study.read_rows())) == keys


# --- The study of the ranks -----------------------------------------------------------------------

@pytest.mark.parametrize("rank", [2, 0])
def test_a_run_of_a_rank_trains_as_many_numbers_as_it_says(tiny_study, rank):
    row = ranks.run_once(rank, "tuple_max", 1, 1e-3)
    assert ranks.key_of(row) == (rank, "tuple_max", 1, 1e-3)
    model = train.build(train.Settings(**row["settings"]), step=3)
    assert row["trained"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 0 <= row["adamw"]["flipped"] <= 1 and 0 <= row["adamw"]["conflict"] <= 1


def test_the_scale_is_what_adamw_divides_by():
    """Torch's own step, with a momentum that is made to be a known direction, and no gradient."""
    torch.manual_seed(0)
    weights = [torch.randn(3, 2, requires_grad=True), torch.randn(5, requires_grad=True)]
    optimizer = torch.optim.AdamW(weights, 0.1, (0.9, 0.99), weight_decay=0.0)
    for _ in range(4):
        optimizer.zero_grad()
        sum((weight * torch.randn_like(weight)).sum() for weight in weights).backward()
        optimizer.step()
    before, directions = [weight.detach().clone() for weight in weights], []
    for weight in weights:
        direction = torch.randn_like(weight)
        directions.append(direction.flatten())
        optimizer.state[weight]["exp_avg"] = direction * (1 - 0.9**5) / 0.9
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    moved = torch.cat([(old - new).flatten() for old, new in zip(before, weights)])
    found = 0.1 * torch.cat(directions) / ranks.adamws_scale(optimizer)
    assert (moved - found).abs().max() < 1e-5 * moved.abs().max()


def test_adamws_metric_is_m_if_its_scale_is_equal_and_one_weights_if_it_is_not(monkeypatch):
    run = begun(rank=2, probe=1)
    inputs, u, _ = report.probe_batch(run.settings, run.roots, 1)
    r = report.residuals_of(run.model, inputs, u)
    G = gradients_of(run, inputs, r, torch.ones(len(r)))
    monkeypatch.setattr(ranks, "adamws_scale", lambda optimizer: torch.full((G.shape[1],), 3.0))
    same = ranks.in_adamws_metric(run)
    assert same["flipped"] == 0
    assert same["conflict"] == ntk.conflict_share(G @ G.T).item()
    # The gradient of one weight alone counts: who is in conflict is a matter of its sign.
    scale = torch.full((G.shape[1],), 1e30)
    above = (G > 0).sum(0)
    # One whose gradients have both signs, as nearly half as often as there is.
    both = above * (len(G) - above) * (G.abs().min(0).values > 1e-3 * G.abs().mean(0))
    one = both.argmax()
    scale[one] = 1.0
    monkeypatch.setattr(ranks, "adamws_scale", lambda optimizer: scale)
    pairs = len(G) * (len(G) - 1) / 2
    other = ranks.in_adamws_metric(run)
    assert other["conflict"] == pytest.approx(both[one].item() / pairs)
    assert other["conflict"] != same["conflict"] and other["flipped"] > 0


def row_of_rank(rank, arm, seed, error):
    """A row whose every error is as named; the shares differ with the rank."""
    views = yardsticks.VIEWS
    read = {f"seen {view} 2": dict.fromkeys(yardsticks.READ, 0.5) for view in views}
    return {"rank": rank, "arm": arm, "seed": seed, "rate": 1e-2, "trained": 1234 + rank,
            "fit": {view: [error] * 3 for view in views}, "reader": read,
            "generalisation": {f"seen {view}": [error] * 3 for view in views},
            "probe": [{"conflict": 0.1}, {"conflict": 0.2 + 0.01 * rank}],
            "adamw": {"conflict": 0.4, "flipped": 0.125},
            "predicted": {"square": 6.0 if arm == "tuple_max" else 5.0, "mean_square": 2.0}}


def test_the_ranks_are_drawn_from_the_rows(tmp_path):
    rows = []
    for rank, seed in itertools.product(ranks.RANKS, ranks.SEEDS):
        rows.append(row_of_rank(rank, "baseline", seed, 0.1))
        rows.append(row_of_rank(rank, "tuple_max", seed, 0.1))
        rows.append(row_of_rank(rank, "sga", seed, 0.1 * (1.01 + 0.01 * seed)))
    # A row that chose the rate is no run of the study.
    rows.append(row_of_rank(4, "baseline", ranks.CHOOSING_SEED, 99.0))
    assert ranks.effect(rows, 4, "sga", regimes_report.fit) == pytest.approx([2, 3, 4])
    line = next(line for line in ranks.table(rows).splitlines() if line.startswith("| 8 |"))
    assert "| 1,242 | 0.01 | 28.0% | 28.0% | 40.0% | 12.5% | 2.5 | 3.0 | 0.1000 | 50.0% |" in line
    file = tmp_path / "ranks.png"
    ranks.draw(rows, file)
    assert file.stat().st_size > 10_000


def test_the_rate_of_a_rank_is_chosen_on_the_baseline_of_the_choosing_seed():
    rows = [row_of_rank(4, "baseline", ranks.CHOOSING_SEED, error) | {"rate": rate}
            for rate, error in ((1e-3, 0.3), (3e-3, 0.2), (1e-2, 0.4))]
    rows.append(row_of_rank(8, "baseline", ranks.CHOOSING_SEED, 0.1) | {"rate": 1.0})
    rows.append(row_of_rank(4, "baseline", 1, 0.1) | {"rate": 1.0})
    assert ranks.chosen_rate(rows, 4) == 3e-3


def test_the_committed_ranks_are_whole_and_their_table_is_theirs():
    rows = ranks.read_rows()
    keys = set(map(ranks.key_of, rows))
    wanted = set(ranks.choices_of_rates())
    for seed in ranks.SEEDS:
        wanted |= set(ranks.runs_of(seed))
    assert keys == wanted and len(rows) == len(keys)
    assert ranks.TABLE.read_text(encoding="utf-8") == ranks.table(rows)
