"""Hidden checks of exercises.py: what the tests of a function leave open, and what only stubs ask.

They call the functions that an answer has put into a module. Plain pytest does not collect them.
"""

import contextlib
import itertools

import pytest
import torch
from torch import nn

import flow_matching as fm
import ntk
import sga
from test_ntk import Case, close
from test_sga import FLOAT32, near, rand, seeded, six_samples, slopes


def check_heun_asks_at_both_ends_of_a_step():
    asked = []

    def velocity(x, t):
        asked.append(t[0].item())
        return torch.ones_like(x)

    for first, between, last in ([1.0, 0.75, 0.0], [0.0, 0.25, 1.0]):
        asked.clear()
        times = torch.tensor([first, between, last])
        end = fm.heun(velocity, torch.zeros(2, 3), times)
        assert asked == [first, between, between, last]
        assert near(end, torch.full((2, 3), last - first))


def check_each_sample_has_weights_of_its_own():
    x, points = rand(3, 2), rand(5, 2, seed=1)
    t = torch.tensor([0.3, 0.6, 0.9])
    pi = rand(3, 5, seed=2).abs()
    for function in (fm.posterior, fm.exact_velocity):
        together = function(x, t, points, pi)
        for i in range(3):
            alone = function(x[[i]], t[[i]], points, pi[i])
            assert near(together[[i]], alone)


def check_groups_may_pull_apart():
    """At v = u* the form is 0: of two groups, each undoes what the other does."""
    x, points = rand(3, 2), rand(4, 2, seed=1)
    pi = rand(3, 4, seed=2).abs()
    groups = torch.tensor([0, 1, 0, 1])
    omega, u_g = fm.group_velocities(x, 0.8, points, groups, pi)
    u_star = fm.exact_velocity(x, 0.8, points, pi)
    assert near(torch.einsum("ng,ngd->nd", omega, u_g), u_star)
    Omega = fm.data_interaction_matrix(u_star, u_g)
    form = torch.einsum("ng,ngh,nh->n", omega, Omega, omega)
    assert near(form, torch.zeros(3))
    assert Omega[:, 0, 1].max() < 0


def check_influence_is_what_a_small_step_does():
    """By a step and its reverse, with three images of a small DiT."""
    case = Case("dit")

    def outputs():
        return case.model(*case.inputs).flatten(1)                     # (N, D)

    for j in range(3):
        r = rand(3, 48, seed=j)
        case.model.zero_grad()
        outputs()[j].backward(r[j])
        moves = slopes(case.model, lambda: outputs().detach())
        residuals = r.view(3, 3, 4, 4)
        found = ntk.influence(*case.all, residuals, j)
        assert close(found.reshape(3, 48), moves, 1e-4)
        rises = (r * moves).sum(1) > 0
        hurt = ntk.hurt(*case.all, residuals, j)
        assert sorted(hurt) == [i for i in range(3) if rises[i]]


def check_training_time_is_that_of_the_frozen_kernel():
    """The kernel of a linear network stands still: Eq. 16 is exact up to the size of a step."""
    for D, eta, steps in ((3, 1e-3, 400), (5, 2e-3, 500)):
        model = nn.Linear(D, D).double()

        def network(x, t, tokens):
            return model(x)

        x0, e = rand(4, D), rand(4, D, seed=1)
        batch = (network, x0, e, 0.5, None)
        r = fm.residual(*batch).detach()
        K = ntk.fast_ntk_blocks(model, (fm.path(x0, e, 0.5),))
        optimizer = torch.optim.SGD(model.parameters(), eta)
        for _ in range(steps):
            optimizer.zero_grad()
            fm.loss(*batch).mean().backward()
            optimizer.step()
        after = fm.residual(*batch).detach()
        tau = ntk.training_time(eta, steps, D)
        predicted = ntk.frozen_residuals(K, r, tau)
        assert (predicted - after).norm() < 0.02 * (r - after).norm()


def check_flipped_signs_are_those_of_real_steps():
    """By steps of torch's AdamW, each from the same state, long after its start."""
    G, eps = rand(6, 20, seed=1), 1e-2
    v = 10 ** (3 * rand(20, seed=2))
    betas = (0.0, 1 - 1e-12)
    moves = []
    for g in G:
        weight = nn.Parameter(torch.zeros(20).double())
        optimizer = torch.optim.AdamW([weight], 1.0, betas, eps, weight_decay=0)
        optimizer.state[weight] = {"step": torch.tensor(1e15),
                                   "exp_avg": torch.zeros_like(g),
                                   "exp_avg_sq": v.clone()}
        weight.grad = g.clone()
        optimizer.step()
        moves.append(weight.detach())
    by_adamw = G @ torch.stack(moves).T
    by_descent = G @ -G.T
    differ = by_adamw.sign() != by_descent.sign()
    assert differ.any()
    # Other metrics must have other signs here: both gradients divided, no eps, and no root.
    for other in ((v.sqrt() + eps) ** 2, v.sqrt(), v + eps):
        by_other = G / other @ -G.T
        assert (by_other.sign() != by_adamw.sign()).any()
    assert torch.equal(ntk.flipped(G, v, eps), differ)


def check_the_broken_example_is_wrong():
    model, inputs, r = ntk.broken()
    wrong = ntk.fast_interaction_matrix(model, inputs, r, check=False)
    right = ntk.interaction_matrix(*ntk.of_module(model), inputs, r)
    assert not close(wrong, right, 1e-3)
    with pytest.raises(ValueError):
        ntk.guard(model, inputs, r, wrong)


def check_the_guard():
    """Which matrices pass, and how many forward and backward passes that takes."""
    # Of so many samples, random signs hardly ever miss an error.
    case, passes = Case("foreign", n=16), []

    def count(model, inputs, v):
        passes.append("forward")
        v.register_hook(lambda g: passes.append("backward"))

    M = ntk.interaction_matrix(*case.all, case.r)
    case.model.register_forward_hook(count)
    ntk.guard(case.model, case.inputs, case.r, M)
    assert passes == ["forward", "backward"]
    other_order = M.roll((1, 1), (0, 1))
    own_alone = M.diag().diag()
    # Right for every s that is made of these four, such as 1, 2, 3, ...; a random s sees the error.
    i = torch.arange(16).double()
    plain = torch.stack([i**0, i, i**2, (-1) ** i])
    Q = torch.linalg.qr(plain.T).Q
    right_for_plain_s = Q @ Q.T @ M @ Q @ Q.T
    for wrong in (1.01 * M, M.abs(), own_alone, M.flip(0), other_order, right_for_plain_s):
        with pytest.raises(ValueError):
            ntk.guard(case.model, case.inputs, case.r, wrong)
    case.model.float()
    inputs = (case.inputs[0].float(),)
    ntk.guard(case.model, inputs, case.r.float(), M.float())


def check_only_the_last_pass_is_not_quiet():
    """The context of a pass is left before the next one, and holds forward and backward."""
    inside, passes = [], []
    weight = torch.ones(1, requires_grad=True)

    @contextlib.contextmanager
    def quiet():
        inside.append("quiet")
        yield
        inside.pop()

    def losses(x):
        each = weight * x
        passes.append(len(inside))
        each.register_hook(lambda g: passes.append(len(inside)))
        return each

    one = ((torch.ones(2),), torch.ones(2))
    total = sga.deferred_backward(losses, [one, one, one], quiet)
    assert total == weight.grad == 6
    assert passes == [1, 1, 1, 1, 0, 0]


def check_tuples_may_have_four_views():
    by_root = torch.tensor([1, 1, 1, 1, 2, 2]).double() / 8
    assert near(sga.tuple_weights([4, 2], k_max=4), by_root)
    assert near(sga.tuple_weights([4, 2], "view", 4), torch.full((6,), 1 / 8).double())


def check_offsets_gammas_and_generator_are_used():
    labels, offsets, gammas = torch.arange(3), (1.0, -2.0, 0.25), (20.0, 1.0, 3.0)
    t = sga.offset_time(labels, seeded(), offsets, std=0.0)
    assert near(t, torch.sigmoid(torch.tensor(offsets)), FLOAT32)
    # At t = 1/4 the SNR is 9.
    for form, expected in (("epsilon", (1, 1 / 9, 1 / 3)), ("velocity", (0.9, 0.1, 0.3))):
        w = sga.min_snr_weight(torch.full((3,), 0.25), labels, gammas, form)
        assert near(w, torch.tensor(expected), FLOAT32)
    generator = seeded(1)
    first, second = (sga.offset_time(labels, generator) for _ in range(2))
    assert torch.equal(first, sga.offset_time(labels, seeded(1)))
    for other in (second, sga.offset_time(labels, seeded(2))):
        assert not near(first, other, within=1e-3)


def check_weighted_velocities_are_slopes():
    model, x, u, a, M, losses = six_samples()
    model.zero_grad()
    (a * losses(x, u)).sum().backward()
    own = slopes(model, lambda: losses(x, u).detach())
    weighted, each, plain = sga.weighted_velocities(M, a)
    assert each.shape == own.shape
    # What is left is of the order of the step's square.
    assert near(weighted, (a * own).sum(), 1e-6)
    assert near(each, own, 1e-6)
    assert near(plain, own.mean(), 1e-6)


def check_root_tuples_change_the_noise_alone():
    for root, own in (([0, 1, 2, 0, 1, 2], [(0, 3), (1, 4), (2, 5)]),
                      ([1, 0, 0, 1, 0, 1], [(1, 2, 4), (0, 3, 5)])):
        root, K = torch.tensor(root), len(own[0])
        any_views = list(itertools.combinations(range(6), K))
        # The views of a root agree.
        G = rand(3, 50)[root] + 0.5 * rand(6, 50, seed=1)
        found = {}
        for meet, steps in (("root", own), ("any", any_views)):
            a = ntk.every_step(root, meet)
            expected = torch.zeros(len(steps), 6).double()
            for row, views in zip(expected, steps):
                row[list(views)] = 1 / K
            # In any order.
            assert sorted(a.tolist()) == sorted(expected.tolist())
            found[meet] = ntk.step_noise(G @ G.T, a)
        of_roots, mean_of_roots = found["root"]
        of_any, mean_of_any = found["any"]
        assert near(mean_of_roots, mean_of_any)
        assert of_roots > 1.1 * of_any
