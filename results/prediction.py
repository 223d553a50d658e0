"""What the interaction matrix of the base says about a way to fine-tune, before it is tried.

A step is ghat = sum_i a_i g_i over the samples that it draws. Inner products of gradients give

- E|ghat|^2, its expected square, and |E ghat|^2, the square of its mean (Eq. 23);
- for each granularity <G_view, E ghat>, the mean rate at which small steps lower its plain loss,
  whose gradient is G_view (Eq. 22). Only the step has weights, hence one factor a (Eq. 21).

An arm is compared with the baseline. Where an arm leaves the expected gradient as it is, only
E|ghat|^2 can differ. A sample's loss is |r|^2 / 2 here, and training is plain gradient descent.
"""

import torch

import flow_matching as fm
import ntk
import sga
import toy_data
from support import machine, report

VIEWS = toy_data.GRANULARITIES


def samples_of(run, arm, repeats, stream):
    """Inputs, residuals and weights of every view `repeats` times, as the arm sees it.

    The noise levels are those of the arm's law, the captions are dropped as in training, and the
    weights are Min-SNR's, or 1. The samples of one view follow each other.
    """
    s, generator = run.settings, machine.seeded(run.settings, stream)
    view = torch.arange(len(run.root), device=s.device).repeat_interleave(repeats)
    n, granularity = len(view), run.granularity[view]
    x0, tokens = toy_data.views(run.roots.take(run.root[view]), granularity, s.pixels)
    kept = torch.rand(n, 1, generator=generator, device=s.device) >= s.caption_dropout
    whose = granularity
    if arm.mixed:
        whose = granularity[torch.randperm(n, generator=generator, device=s.device)]
    t = sga.offset_time(whose, generator, arm.offsets, s.time_mean, s.time_std, s.time_shift)
    e = torch.randn(x0.shape, generator=generator, device=s.device)
    weight = torch.ones(n, device=s.device)
    if arm.min_snr:
        weight = sga.min_snr_weight(t, granularity, form=arm.min_snr)
    inputs = (fm.path(x0, e, t), t, tokens * kept)
    r = report.residuals_of(run.model, inputs, fm.target(x0, e))
    return inputs, r, weight


def own_and_between(run, arm, repeats):
    """own (V,) and between (V, V): the expected inner products of weighted gradients, from M.

    own is that of a sample with itself. between is that of two samples that are drawn apart, also
    where both are of the same view.
    """
    if repeats < 2:
        raise ValueError("a view must be drawn twice or more, to tell what two draws share, not "
                         f"{repeats} times")
    V = len(run.root)
    inputs, r, weight = samples_of(run, arm, repeats, 2)
    M = report.interaction_matrix_of(run.model, inputs, r)         # (N, N) N = V repeats
    M = weight[:, None] * M * weight                               # (N, N)
    own = M.diagonal().view(V, repeats).mean(1)
    blocks = M.view(V, repeats, V, repeats)
    between = blocks.mean((1, 3))
    # Of one view: without the pairs of a sample with itself.
    all_pairs = between.diagonal() * repeats**2
    apart = (all_pairs - own * repeats) / (repeats * (repeats - 1))
    return own, between.diagonal_scatter(apart)


def expected_squares(steps, own, between):
    """(E|ghat|^2, |E ghat|^2) over the planned steps [(views, a)], all equally likely (Eq. 23)."""
    V = len(own)
    a = torch.zeros(len(steps), V, dtype=torch.float64)
    extra = 0.0
    own, between = own.double().cpu(), between.double().cpu()
    for row, (views, weights) in zip(a, steps):
        weights = weights.double().cpu()
        # A view that comes twice in a step comes with two noises.
        row.index_add_(0, views.cpu(), weights)
        extra += weights.square() @ (own - between.diagonal())[views.cpu()]
    square, mean_square = ntk.step_noise(between, a)
    return square.item() + extra.item() / len(steps), mean_square.item()


def rates_by_view(run, arm, steps, repeats):
    """{view: <G_view, E ghat>}, the rate at which small steps of the arm lower each plain loss."""
    V = len(run.root)
    inputs, r, weight = samples_of(run, arm, repeats, 2)
    a = torch.zeros(V, dtype=torch.float64)
    for views, weights in steps:
        a.index_add_(0, views.cpu(), weights.double().cpu() / len(steps))
    # The plain loss is that of the baseline's noise levels. Its noises are others.
    seen, r_seen, _ = samples_of(run, sga.ARMS["baseline"], repeats, 4)
    M = report.interaction_matrix_of(run.model, seen, r_seen, columns=(inputs, r))
    M = M * weight                                                 # (N, N) rows evaluated
    by_view = M.view(V, repeats, V, repeats).mean((1, 3)).double().cpu()
    rates = {}
    for index, view in enumerate(VIEWS):
        own = (run.granularity == index).cpu()
        rates[view] = (by_view[own].mean(0) @ a).item()
    return rates


def predict(run, repeats=4):
    """The numbers of a run at the start of its fine-tuning: of its arm, as a dictionary."""
    own, between = own_and_between(run, run.arm, repeats)
    square, mean_square = expected_squares(run.plan, own, between)
    return {"square": square, "mean_square": mean_square,
            "rates": rates_by_view(run, run.arm, run.plan, repeats)}
