"""The exercises, in the reading order of the modules; exercises.py lists and judges them.

Three kinds: write functions from a stub, predict which tests a change breaks, and predict what was
measured. Most functions to write are those of the repository. Solutions of the others are in
tests/test_exercises.py, which tests the judge. Nothing needs that file: a course can leave it out.
"""

import json
from pathlib import Path
from typing import Callable, NamedTuple

ROWS = Path(__file__).parent.parent / "results/study.jsonl"


# --- What was measured, computed from the rows of the study ---------------------------------------
# A row is one run: a network, fine-tuned from a base (a pretrained network) in one way (an arm) and
# with one seed. Only runs of one base compare.

def of_each_base(measure):
    """{(network, base): measure(its rows)}, the first base of each network first."""
    rows = {}
    with open(ROWS, encoding="utf-8") as stream:
        for row in map(json.loads, stream):
            rows.setdefault((row["model"], row["base"]), []).append(row)
    return {start: measure(rows[start]) for start in sorted(rows)}


def told(found, what):
    return [f"{model}, base {base}: {what}: {value}" for (model, base), value in found.items()]


def shares_of_conflict(rows):
    """{what two samples share: the mean share of pairs in conflict after the start}."""
    shares = {}
    for point in [point for row in rows for point in row["probe"][1:]]:
        for kind, pairs in point["pairs"].items():
            shares.setdefault(kind, []).append(pairs["conflict"])
    return {kind: round(sum(found) / len(found), 4) for kind, found in shares.items()}


def conflict_by_kind():
    """The kinds of pairs with the fewest and with the most conflicts: DiT, first base."""
    shares = of_each_base(shares_of_conflict)
    first = next(own for (model, _), own in shares.items() if model == "dit")
    order = sorted(first, key=first.get)
    return [order[0], order[-1]], told(shares, "share of pairs with M_ij < 0"), sorted(order)


def gaps_to_the_baseline(rows):
    """The final error |v - u*|^2 / D of SGA minus that of the baseline, for each seed of both."""
    error = {"sga": {}, "baseline": {}}
    for row in rows:
        own = [part["error"] for part in row["rows"]
               if (part["domain"], part["split"]) == ("target", "seen")]
        error.setdefault(row["arm"], {})[row["seed"]] = sum(own) / len(own)
    seeds = sorted(error["sga"].keys() & error["baseline"].keys())
    return [round(error["sga"][seed] - error["baseline"][seed], 6) for seed in seeds]


def sga_or_baseline():
    """For the DiT and the U-Net, from the first base: is SGA lower or higher for every seed?"""
    gaps, words = of_each_base(gaps_to_the_baseline), []
    for wanted in ("dit", "unet"):
        first = next(own for (model, _), own in gaps.items() if model == wanted)
        words.append("lower" if max(first) < 0 else "higher" if min(first) > 0 else "open")
    # Of the U-Net's second base, these arms were begun and not completed.
    complete = {start: found for start, found in gaps.items() if len(found) >= 3}
    figures = told(complete, "error of SGA minus that of the baseline, by seed")
    return words, figures, ["lower", "higher", "open"]


# --- The exercises --------------------------------------------------------------------------------

class Exercise(NamedTuple):
    title: str
    stars: int                             # 1 to 3: how difficult it is, and its points
    minutes: int
    module: str                            # where the functions belong, and whose names are known
    task: str
    stubs: tuple = ()                      # (signature, what is required) of the functions to write
    tests: tuple = ()                      # in tests/test_MODULE.py, or FILE: these judge
    checks: tuple = ()                     # in exercises_checks.py: these judge, too
    change: tuple = ()                     # (old, new) in the module: which of the tests fail then?
    measure: Callable = None               # finds (the right words, figures, words to choose)

    def names(self):
        return [signature.partition("(")[0] for signature, _ in self.stubs]


BREAKS = " Predict all tests that fail then, by their names."

EXERCISES = (
    Exercise(
        "From data to noise", 1, 20, "flow_matching", "Write all that training needs (Eq. 1-3).",
        (("path(x0, e, t)",
          "(N, ...) points on the straight lines between data x0 and noise e, both (N, ...): data "
          "at t = 0, noise at t = 1. t is one number, (N,) or (N, 1)."),
         ("target(x0, e)", "(N, ...) how fast a point moves along its path while t grows."),
         ("residual(model, x0, e, t, tokens)",
          "(N, ...) the network's velocity at the points of the paths minus the target. "
          "model(x, t, tokens) gets t as (N,)."),
         ("loss(model, x0, e, t, tokens)",
          "(N,) each residual's squared length, divided by its number of outputs.")),
        tests=("test_noise_is_at_one_and_data_at_zero", "test_target_is_the_derivative_of_the_path",
               "test_loss_is_zero_for_the_target_and_known_for_a_constant_error",
               "test_t_is_a_number_or_one_for_each_sample")),
    Exercise(
        "From noise to data", 1, 20, "flow_matching",
        "Write a sampler whose order can be measured as a slope (Eq. 6).",
        (("heun(velocity, x, times)",
          "(N, ...) where x (N, ...) ends that moves with velocity(x, t), t (N,), from times[0] to "
          "times[-1]. times (T,) are in any steps, up or down. Each step takes two calls, one at "
          "each of its ends; half the step must leave a quarter of the error."),),
        tests=("test_euler_is_of_first_and_heun_of_second_order",),
        checks=("check_heun_asks_at_both_ends_of_a_step",)),
    Exercise(
        "The best possible velocity", 2, 30, "flow_matching",
        "Write what a perfect network would say (Eq. 4).",
        (("_posterior_and_velocity(x, t, points, log_pi)",
          "w (N, S) and u* (N, D) in float64. x (N, D) are points of paths at the noise levels t "
          "(N, 1), with noise e ~ N(0, I). Each has data of its own, points (N, S, D), which occur "
          "as often as exp(log_pi) (N, S) says, up to a factor. w_k is the probability that x came "
          "from point k, and u* the mean velocity of all paths through x. Points may be close."),),
        tests=("test_exact_velocity_is_that_of_the_score",
               "test_populations_may_differ_from_sample_to_sample",
               "test_close_points_are_told_apart_at_small_t"),
        checks=("check_each_sample_has_weights_of_its_own",)),
    Exercise(
        "Groups of data interact", 2, 25, "flow_matching",
        "Write the error as a quadratic form, for any groups (Eq. 7-9).",
        (("group_velocities(x, t, points, groups, pi=None)",
          "omega (N, G) and u_g (N, G, ...): the probability that x (N, ...) came from each group, "
          "and its exact velocity if the group were the whole population. groups (S,) gives each "
          "point a number 0..G-1; pi is (S,) or (N, S). You have posterior and exact_velocity."),
         ("data_interaction_matrix(v, u_g)",
          "(N, G, G) the matrix Omega of |v - u*|^2 as a quadratic form in omega.")),
        tests=("test_groups_make_up_the_velocity",
               "test_a_group_alone_is_a_population_of_its_own"),
        checks=("check_groups_may_pull_apart",)),
    Exercise(
        "The ends of the path", 2, 20, "flow_matching",
        "Many papers have noise at t = 0. Suppose path returned t x0 + (1 - t) e." + BREAKS,
        tests=("test_flow_matching.py",),
        change=("return (1 - t) * x0 + t * e", "return t * x0 + (1 - t) * e")),
    Exercise(
        "Who pulls with whom", 2, 30, "ntk", "Write the interaction matrix (Eq. 10, 12).",
        (("per_sample_gradients(f, params, inputs, vectors)",
          "(N, P) for each sample the gradient of <its vector, its output f(params, *sample)> with "
          "respect to the dict params, in their order. inputs is a tuple of tensors (N, ...), "
          "vectors are (N, *output shape). The result is detached."),
         ("interaction_matrix(f, params, inputs, residuals, chunk=None, columns=None)",
          "(N, N) all <g_i, g_j>, detached. With columns = (inputs, residuals) of N2 other samples "
          "it is (N, N2). chunk may be ignored.")),
        tests=("test_all_routes_to_the_interaction_matrix_agree[foreign]",
               "test_the_matrix_between_two_batches_is_a_block_of_the_matrix_of_both[foreign]")),
    Exercise(
        "A step on one image", 2, 30, "ntk",
        "Compute what learning one image does to others, and which of them it hurts (Eq. 11, 12). "
        "Then draw it for three images of toy_data, a row for each. (The drawing is not judged.)",
        (("influence(f, params, inputs, residuals, j)",
          "(N, D) how fast every output moves while gradient descent follows the loss |r_j|^2 / 2 "
          "of sample j alone. f, params, inputs and residuals are as for interaction_matrix."),
         ("hurt(f, params, inputs, residuals, j)",
          "[i, ...] the samples whose own loss |r_i|^2 / 2 rises in a small such step.")),
        checks=("check_influence_is_what_a_small_step_does",)),
    Exercise(
        "Own progress and interference", 2, 30, "ntk",
        "Derive Eq. 13 and 14 from dtheta/dtau = -grad L, and write them.",
        (("loss_velocity(M)",
          "Two numbers that add up to dL/dtau, L = 1/(2N) sum_i |r_i|^2: what the samples do to "
          "themselves, and what they do to each other. M (N, N) holds <g_i, g_j>."),
         ("sample_velocities(M)", "(N,), (N,): the same two for each sample's |r_i|^2 / 2.")),
        tests=("test_the_loss_falls_at_the_rate_of_the_interaction_matrix",)),
    Exercise(
        "From a learning rate to a time", 1, 15, "ntk",
        "Convert steps to the time tau, for which the frozen kernel predicts (Eq. 3, 16).",
        (("training_time(eta, steps, D)",
          "tau, the time of dtheta/dtau = -grad L, L = 1/(2N) sum_i |r_i|^2, after so many steps "
          "of size eta down flow_matching.loss(...).mean(), for samples of D outputs."),),
        checks=("check_training_time_is_that_of_the_frozen_kernel",)),
    Exercise(
        "Signs under AdamW", 2, 25, "ntk",
        "M is for plain gradient descent. Find which of its signs are others for AdamW (Eq. 15).",
        (("flipped(G, v, eps)",
          "(N, N) True where a small step for sample j alone raises sample i's loss under one of "
          "gradient descent and AdamW, and lowers it under the other. G (N, P) are the gradients; "
          "v (P,) is AdamW's mean of squared gradients, which the step hardly changes. It has "
          "no momentum and no weight decay."),),
        checks=("check_flipped_signs_are_those_of_real_steps",)),
    Exercise(
        "Break the fast route, then guard it", 3, 45, "ntk",
        "Find a model for which the fast route to M is silently wrong. Then write a guard from "
        "s^T M s = |sum_i s_i g_i|^2: which s (Eq. 13)?",
        (("broken()",
          "(model, inputs, residuals) in float64 for which fast_interaction_matrix(model, inputs, "
          "residuals, check=False) is wrong, and the clear route right. What can a model do that "
          "the inputs and outputs of its layers do not show?"),
         ("guard(model, inputs, residuals, M)",
          "Raises ValueError unless M is the interaction matrix of model(*inputs), with one "
          "forward and one backward pass. A right M in float32 must pass.")),
        checks=("check_the_broken_example_is_wrong", "check_the_guard")),
    Exercise(
        "One step for the views of a root", 2, 30, "sga",
        "Write one step of several backward passes, and both of its scalings (Eq. 18).",
        (("tuple_weights(sizes, scaling='root', k_max=3)",
          "(n,) float64 the weights of all views of a step whose tuples have these sizes. 'root': "
          "every tuple weighs the same, 1 in all. 'view': every view weighs what it would if all "
          "tuples had k_max views."),
         ("deferred_backward(losses, sub_batches, quiet=contextlib.nullcontext)",
          "The sum of a_i loss_i over all pairs (batch, a) of sub_batches; adds its gradient by a "
          "backward pass for each pair. losses(*batch) and a are (n,). Forward and backward pass "
          "of every pair but the last run inside a context quiet() of their own.")),
        tests=("test_weights_of_both_scalings",
               "test_the_deferred_step_is_one_big_step_whatever_the_sub_batches",
               "test_gradients_are_exchanged_with_the_last_sub_batch_only"),
        checks=("check_only_the_last_pass_is_not_quiet",
                "check_tuples_may_have_four_views")),
    Exercise(
        "Noise levels and weights by granularity", 2, 30, "sga",
        "Write what SGA can change beside the tuples (Eq. 19, 20).",
        (("offset_time(granularity, generator, offsets=OFFSETS, mean=0.0, std=1.0, shift=1.0)",
          "(n,) random t whose logit is normal, with `mean` plus the granularity's offset as its "
          "mean, and the standard deviation std. The shift adds its logarithm to the logit. "
          "Rounding must not lead out of 0..1."),
         ("min_snr_weight(t, granularity, gammas=GAMMAS, form='epsilon')",
          "(n,) weights of a loss on e (Eq. 20): 1 from t = 1 down to where the signal-to-noise "
          "ratio is the granularity's gamma; from there it falls without a jump, to 0 at t = 0. t "
          "is (n,) or one number, 0 and 1 included. 'velocity': the weight that does the same to a "
          "loss on the velocity, divided by (1 - t)^2 + t^2; which error of e does an error of the "
          "velocity make at a given x_t? Another form: a ValueError that names both.")),
        tests=("test_time_laws_against_their_closed_form",
               "test_each_sample_gets_the_offset_of_its_granularity",
               "test_the_shift_keeps_the_order_and_the_ends",
               "test_weights_begin_to_act_where_snr_is_gamma",
               "test_the_weight_has_its_limits_at_both_ends",
               "test_the_velocity_form_is_the_epsilon_form_carried_over"),
        checks=("check_offsets_gammas_and_generator_are_used",)),
    Exercise(
        "One factor or two", 2, 20, "sga",
        "Does a weight of the loss count once or twice, in training and in evaluation (Eq. 21)?",
        (("weighted_velocities(M, a)",
          "A number, (N,), a number: how fast these change while the parameters follow -sum_j a_j "
          "g_j: the weighted loss sum_i a_i L_i, each sample's own loss L_i = |r_i|^2 / 2, and "
          "the plain mean of these. M (N, N) holds <g_i, g_j>."),),
        checks=("check_weighted_velocities_are_slopes",)),
    Exercise(
        "What meeting changes", 3, 40, "ntk",
        "Show that root tuples leave the expected gradient and change its noise (Eq. 23).",
        (("every_step(root, meet)",
          "(S, V) float64, a row for each possible step: the weights of the V views in it, equal "
          "for all that meet, with the sum 1. root (V,) is each view's root; every root has K "
          "views. meet = 'root': the views of one root. meet = 'any': any K views."),
         ("step_noise(M, a)",
          "(E|ghat|^2, |E ghat|^2) of ghat = sum_i a_i g_i. All rows of a are equally likely.")),
        tests=("test_the_noise_of_a_step_is_that_of_every_possible_step",
               "test_agreeing_tuples_make_a_step_noisier_and_conflicting_ones_quieter"),
        checks=("check_root_tuples_change_the_noise_alone",)),
    Exercise(
        "Samples that know each other", 2, 15, "unet",
        "J_i is the derivative of one sample's velocity; it has a meaning only where no sample "
        "changes another's. Suppose that norm returned BatchNorm instead of GroupNorm." + BREAKS,
        tests=("test_networks.py",),
        change=("return nn.GroupNorm(8, channels)", "return nn.BatchNorm2d(channels)")),
    Exercise(
        "Which pairs conflict?", 2, 15, "ntk",
        "The first study probes a few roots, each in three views at three noise levels. A pair of "
        "samples is named by all that the two share. Predict which kind of pair conflicts least "
        "(M_ij < 0), then which most, in the DiT's runs from its first base (a base is a "
        "pretrained network, from which runs start).",
        measure=conflict_by_kind),
    Exercise(
        "Does it help?", 1, 10, "sga",
        "The first study fine-tunes with SGA and with the baseline: equally many images, the same "
        "first base (a pretrained network), the same seeds. Predict the final error |v - u*|^2/D "
        "of SGA on the roots' captions beside the baseline's, first for the DiT, then for the "
        "U-Net: lower (for every seed), higher (for every seed) or open.",
        measure=sga_or_baseline),
)
