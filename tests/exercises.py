"""Exercises in the reading order of the modules, each with its judge. There are no solutions: the repository is the solution.

    python tests/exercises.py                          # the list
    python tests/exercises.py 4                        # runs the tests that judge exercise 4
    python tests/exercises.py 6 test_this test_that    # compares your prediction, where an exercise asks for one

Three kinds: write a function again, predict which tests a change breaks, predict what was measured.
"""

import contextlib
import functools
import importlib
import json
import sys
from pathlib import Path
from typing import Callable, NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
ROWS = ROOT / "results/study.jsonl"
sys.path.insert(0, str(ROOT))


class Exercise(NamedTuple):
    title: str
    module: str
    functions: str                         # whose bodies to write again, or to think about
    task: str
    why: str
    tests: tuple = ()                      # in tests/test_MODULE.py, or FILE::TEST: these judge
    change: tuple = ()                     # (old, new) in the module's source: which of the tests fail then?
    measure: Callable = None               # finds what was measured: (the right words, the figures)


# --- What was measured, computed from the rows of the study ------------------------------------------------------

def study():
    return [json.loads(line) for line in ROWS.read_text().splitlines()]


def conflict_by_kind():
    """The kinds of pairs with the fewest and with the most conflicts, over all runs and their checkpoints after the start."""
    points = [point["pairs"] for row in study() for point in row["probe"][1:]]
    share = {kind: sum(pairs[kind]["conflict"] for pairs in points) / len(points) for kind in points[0]}
    order = sorted(share, key=share.get)
    return [order[0], order[-1]], [f"{kind:10} {share[kind]:6.1%} of the pairs have M_ij < 0" for kind in order]


def final_error(row):
    """|v - u*|^2 / D on the captions of the roots, the mean over the views."""
    found = [part["error"] for part in row["rows"] if part["domain"] == "target" and part["split"] == "seen"]
    return sum(found) / len(found)


def sga_or_baseline():
    """For each network whether SGA's final error is lower or higher than the baseline's for every seed, or whether that is open."""
    error = {(row["model"], row["arm"], row["seed"]): final_error(row) for row in study() if row["arm"] in ("sga", "baseline")}
    words, figures = [], []
    for model in ("dit", "unet"):
        seeds = sorted(seed for name, arm, seed in error if (name, arm) == (model, "sga"))
        gaps = [error[model, "sga", seed] - error[model, "baseline", seed] for seed in seeds]
        words.append("lower" if max(gaps) < 0 else "higher" if min(gaps) > 0 else "open")
        figures.append(f"{model}: |v - u*|²/D of SGA minus that of the baseline, seed by seed: " + ", ".join(f"{gap:+.4f}" for gap in gaps))
    return words, figures


# --- The list ----------------------------------------------------------------------------------------------------

AGAIN = "Delete each body and the formula in its docstring, and write it again until the judge passes (git checkout brings it back). "
BREAKS = "Predict all tests of the judge that fail then (demos aside), by their names."

EXERCISES = (
    Exercise("All images of a caption", "toy_data", "population",
             AGAIN + "A caption leaves open which of 18 jitters and sizes was drawn.",
             "Only a finite population has an exact velocity that can be summed up (Eq. 4).",
             ("test_the_population_of_a_caption",)),
    Exercise("From data to noise", "flow_matching", "path, target, loss",
             AGAIN + "Mind which end is noise: t = 0 is data, t = 1 is noise.",
             "Eq. 1-3 are all of the training.",
             ("test_noise_is_at_one_and_data_at_zero", "test_target_is_the_derivative_of_the_path",
              "test_loss_is_zero_for_the_target_and_known_for_a_constant_error")),
    Exercise("From noise to data", "flow_matching", "heun",
             AGAIN + "Half the step must leave a quarter of the error.",
             "The order of a sampler is a slope that can be measured (Eq. 6).",
             ("test_euler_is_of_first_and_heun_of_second_order",)),
    Exercise("The best possible velocity", "flow_matching", "posterior, exact_velocity",
             AGAIN + "Which of the data points did x come from, and where do they pull it?",
             "This is what a perfect network would say (Eq. 4); what it cannot say is the floor of the loss (Eq. 5).",
             ("test_exact_velocity_is_that_of_the_score", "test_populations_may_differ_from_sample_to_sample", "test_exact_velocity_refuses_times_outside_its_range")),
    Exercise("Groups of data interact", "flow_matching", "group_velocities, data_interaction_matrix",
             AGAIN + "A group alone is the population with weight 0 elsewhere.",
             "The error is a quadratic form for any partition, a random one too (Eq. 7-9).",
             ("test_groups_make_up_the_velocity",)),
    Exercise("The ends of the path", "flow_matching", "path",
             "Many papers have noise at t = 0. Suppose that path returned t x0 + (1 - t) e and all else stayed. " + BREAKS,
             "A convention lives in several functions at once; tests that call only one of them cannot see it (Eq. 1, 2, 4).",
             ("test_flow_matching.py",), ("return (1 - t) * x0 + t * e", "return t * x0 + (1 - t) * e")),
    Exercise("Who pulls with whom", "ntk", "per_sample_gradients, interaction_matrix",
             AGAIN + "Start without the chunks; the judge compares with a plain loop of autograd.",
             "Where M_ij < 0, a small step for sample i alone makes the loss of sample j larger (Eq. 10, 12).",
             ("test_all_routes_to_the_interaction_matrix_agree[foreign]",)),
    Exercise("Own progress and interference", "ntk", "loss_velocity, sample_velocities",
             AGAIN + "Derive Eq. 13 and 14 from dtheta/dtau = -grad L first: where does 1/N² come from, and where 1/N?",
             "A sample is made worse by its batch when the interference outweighs its own progress.",
             ("test_the_loss_falls_at_the_rate_of_the_interaction_matrix",)),
    Exercise("One step for the views of a root", "sga", "tuple_weights, deferred_backward",
             AGAIN + "Several backward passes, no step: the gradient must be that of one big batch.",
             "1/K_g gives every root the same weight, 1/K_max every view (Eq. 18).",
             ("test_weights_of_both_scalings", "test_the_deferred_step_is_one_big_step_whatever_the_sub_batches")),
    Exercise("Noise levels and weights by granularity", "sga", "offset_time, min_snr_weight",
             AGAIN + "Macro views see more noise, micro views less.",
             "With the tuples, this is all that SGA can change (Eq. 19-21).",
             ("test_time_laws_against_their_closed_form", "test_each_sample_gets_the_offset_of_its_granularity",
              "test_weights_begin_to_act_where_snr_is_gamma", "test_the_velocity_form_is_the_epsilon_form_carried_over")),
    Exercise("An offset in the wrong place", "sga", "offset_time",
             "Suppose that the offset were added after the sigmoid instead of before. " + BREAKS,
             "A shift of the logit keeps t between 0 and 1 (Eq. 19).",
             ("test_sga.py",), ("torch.sigmoid(mu + ", "mu + torch.sigmoid(")),
    Exercise("Images as words", "dit", "patchify, unpatchify",
             AGAIN + "Row by row, and each undoes the other.",
             "A transformer sees a sequence; with a patch in the wrong place the image is in pieces.",
             ("test_networks.py::test_unpatchify_undoes_patchify",)),
    Exercise("Samples that know each other", "unet", "norm",
             "Suppose that norm returned BatchNorm instead of GroupNorm. " + BREAKS,
             "J_i is the derivative of one sample's velocity; it has a meaning only where no sample changes another's (Eq. 10, 11).",
             ("test_networks.py",), ("return nn.GroupNorm(8, channels)", "return nn.BatchNorm2d(channels)")),
    Exercise("Which pairs conflict?", "ntk", "interaction_matrix",
             "The study probes a few roots, each in three views at three noise levels. A pair is named by all that its two samples share: "
             "\"root view\", \"root level\", \"view level\", root, view, level or nothing. Predict which of these conflicts least, then which most.",
             "SGA chooses which pairs meet in one step, so it matters which of them conflict (Eq. 12, 18).", measure=conflict_by_kind),
    Exercise("Does it help?", "sga", "root_tuples, offset_time, min_snr_weight",
             "The study fine-tunes with SGA and with the baseline, on equally many images, with several seeds. Predict the final error |v - u*|²/D "
             "of SGA beside the baseline's on the roots' captions: lower (for every seed), higher (for every seed) or open. Say one of these words "
             "for the DiT, then one for the U-Net.",
             "This is the claim of the paper, with controls.", measure=sga_or_baseline),
)


# --- The judge ---------------------------------------------------------------------------------------------------

def run(exercise, *options):
    """Runs the tests of an exercise in this process: (pytest is content, {name of the test: whether it passed})."""
    passed = {}

    class Watch:
        def pytest_runtest_logreport(self, report):
            name = report.nodeid.split("::")[1].split("[")[0]
            passed[name] = passed.get(name, True) and not report.failed
    where = [str(ROOT / "tests" / test) for test in nodes(exercise)]
    quick = ["-p", "no:cacheprovider", "-p", "no:unraisableexception", "-W", "ignore", f"--rootdir={ROOT}"]
    return pytest.main([*quick, *options, *where], plugins=[Watch()]) == 0, passed


def nodes(exercise):
    return [test if ".py" in test else f"test_{exercise.module}.py::{test}" for test in exercise.tests]


@contextlib.contextmanager
def changed(name, source):
    """The module with another source: in this process alone, the file stays as it is."""
    module = importlib.import_module(name)
    before = dict(vars(module))
    exec(compile(source, module.__file__, "exec"), vars(module))
    try:
        yield
    finally:
        vars(module).clear()
        vars(module).update(before)


@functools.cache
def truth(number):
    """What a prediction is compared with, found now: (the right words, the figures, all tests to choose from or None)."""
    exercise = EXERCISES[number - 1]
    if exercise.measure:
        return *exercise.measure(), None
    old, new = exercise.change
    source = (ROOT / f"{exercise.module}.py").read_text()
    if source.count(old) != 1:
        sys.exit(f"{exercise.module}.py has no longer what this exercise changes: {old}")
    with changed(exercise.module, source.replace(old, new)):
        _, passed = run(exercise, "-p", "no:terminal", "-k", "not demo")
    words = [name for name, fine in passed.items() if not fine]
    return words, [f"{len(words)} of {len(passed)} tests fail"], list(passed)


def judge_prediction(number, prediction):
    words, figures, tests = truth(number)
    print(*figures, sep="\n")
    if tests is None:                                                      # two words, in this order
        right = prediction == words
        print("right" if right else "wrong: the answer is " + ", then ".join(words))
        return right
    for name in sorted(set(prediction) - set(tests)):
        print(f"there is no test {name!r} among them")
    named, vain = set(prediction) & set(words), set(prediction) - set(words)
    right = len(named) == len(words) and not vain
    print("right" if right else f"not yet: you named {len(named)} of them, and {len(vain)} that do not fail")
    return right


def show(number, exercise):
    print(f"{number:2}. {exercise.title} ({exercise.module}.py: {exercise.functions})\n    {exercise.task}\n    Why: {exercise.why}")
    for judge in ["tests/" + test for test in nodes(exercise)] or [f"results/{ROWS.name}, read when you ask"]:
        print("    Judge:", judge)
    print()


def main(arguments):
    """0 if all is right, 1 if not, 2 if the question is unclear."""
    number, *prediction = arguments or ["0"]
    if number not in map(str, range(len(EXERCISES) + 1)):
        print(f"there is no exercise {number}; without a number you see the list of {len(EXERCISES)}")
        return 2
    number, exercise = int(number), EXERCISES[int(number) - 1]
    if number == 0:
        for pair in enumerate(EXERCISES, 1):
            show(*pair)
        return 0
    show(number, exercise)
    if not exercise.change and not exercise.measure:
        right, _ = run(exercise, "-q", "--tb=short", "-x")
        print("passed" if right else "not yet")
    elif not prediction:
        print(f"This one asks for your prediction: python tests/exercises.py {number} WORD ...")
        return 2
    else:
        right = judge_prediction(number, prediction)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
