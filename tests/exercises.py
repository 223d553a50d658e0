"""Exercises in the reading order of the modules, each with its judge.

There are no solutions: the repository is the solution.

    python tests/exercises.py                          # the list
    python tests/exercises.py 4                        # runs the tests that judge exercise 4
    python tests/exercises.py 6                        # the words from which to predict
    python tests/exercises.py 6 test_this test_that    # compares your prediction

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


# --- What was measured, computed from the rows of the study ---------------------------------------
#
# A row is one run: a network, fine-tuned from a base in one way (an arm), with one seed. Runs of
# different bases start from different pretrained networks, so that only runs of one base compare.

def study():
    with open(ROWS, encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def mean(values):
    return sum(values) / len(values)


def conflict_by_kind():
    """The kinds of pairs with the fewest and with the most conflicts in the first base."""
    shares = {}                                # {base: {kind: [its share at each checkpoint]}}
    for row in study():
        of_base = shares.setdefault(row["base"], {})
        for point in row["probe"][1:]:         # the checkpoints after the start
            for kind, pairs in point["pairs"].items():
                of_base.setdefault(kind, []).append(pairs["conflict"])
    first = shares[min(shares)]
    order = sorted(first, key=lambda kind: mean(first[kind]))
    figures = []
    for kind in order:
        found = [f"{mean(shares[base][kind]):6.1%} (base {base})" for base in sorted(shares)]
        figures.append(f"{kind:10} M_ij < 0 in {', '.join(found)} of the pairs")
    return [order[0], order[-1]], figures, order


def final_error(row):
    """|v - u*|^2 / D on the captions of the roots, the mean over the granularities."""
    found = []
    for part in row["rows"]:
        if part["domain"] == "target" and part["split"] == "seen":
            found.append(part["error"])
    return mean(found)


def sga_or_baseline():
    """For the DiT and the U-Net: is SGA's final error lower or higher in every run, or open?"""
    error = {}
    for row in study():
        error[row["base"], row["model"], row["arm"], row["seed"]] = final_error(row)
    words, figures = [], []
    for model in ("dit", "unet"):
        gaps = []
        for base, network, arm, seed in sorted(error):
            if (network, arm) == (model, "sga"):
                both = error[base, model, "sga", seed], error[base, model, "baseline", seed]
                gaps.append(both[0] - both[1])
        words.append("lower" if max(gaps) < 0 else "higher" if min(gaps) > 0 else "open")
        listed = ", ".join(f"{gap:+.4f}" for gap in gaps)
        figures.append(f"{model}: |v - u*|²/D of SGA minus that of the baseline of the same base "
                       f"and seed: {listed}")
    return words, figures, ["lower", "higher", "open"]


# --- The exercises --------------------------------------------------------------------------------

class Exercise(NamedTuple):
    title: str
    module: str
    functions: tuple                       # whose bodies to write again, or to think about
    task: str
    why: str
    tests: tuple = ()                      # in tests/test_MODULE.py, or FILE: these judge
    change: tuple = ()                     # (old, new) in the module: which of the tests fail then?
    measure: Callable = None               # finds (the right words, figures, words to choose)

    def is_to_write(self):
        return not self.change and not self.measure


AGAIN = ("Delete each body and the formula in its docstring, and write it again until the judge "
         "passes (git checkout brings it back). ")
BREAKS = "Predict all tests of the judge that fail then, by their names."

EXERCISES = (
    Exercise(
        "All images of a caption", "toy_data", ("population",),
        AGAIN + "A caption leaves open which of 18 jitters and sizes was drawn.",
        "Only a finite population has an exact velocity that can be summed up (Eq. 4).",
        ("test_the_population_of_a_caption",)),
    Exercise(
        "From data to noise", "flow_matching", ("path", "target", "residual", "loss"),
        AGAIN + "Mind which end is noise: t = 0 is data, t = 1 is noise.",
        "Eq. 1-3 are all of the training.",
        ("test_noise_is_at_one_and_data_at_zero",
         "test_target_is_the_derivative_of_the_path",
         "test_loss_is_zero_for_the_target_and_known_for_a_constant_error")),
    Exercise(
        "From noise to data", "flow_matching", ("heun",),
        AGAIN + "Half the step must leave a quarter of the error.",
        "The order of a sampler is a slope that can be measured (Eq. 6).",
        ("test_euler_is_of_first_and_heun_of_second_order",)),
    Exercise(
        "The best possible velocity", "flow_matching",
        ("posterior", "exact_velocity", "_posterior_and_velocity"),
        AGAIN + "Which of the data points did x come from, and where do they pull it? Mind that "
        "each sample may have a population, and weights pi, of its own.",
        "This is what a perfect network would say (Eq. 4); what it cannot say is the floor of the "
        "loss (Eq. 5).",
        ("test_exact_velocity_is_that_of_the_score",
         "test_populations_may_differ_from_sample_to_sample",
         "test_a_group_alone_is_a_population_of_its_own")),
    Exercise(
        "Groups of data interact", "flow_matching", ("group_velocities", "data_interaction_matrix"),
        AGAIN + "A group alone is the population with weight 0 elsewhere.",
        "The error is a quadratic form for any partition, a random one too (Eq. 7-9).",
        ("test_groups_make_up_the_velocity",)),
    Exercise(
        "The ends of the path", "flow_matching", ("path",),
        "Many papers have noise at t = 0. Suppose that path returned t x0 + (1 - t) e and all else "
        "stayed. " + BREAKS,
        "A convention lives in several functions at once; tests that call only one of them cannot "
        "see it (Eq. 1, 2, 4).",
        ("test_flow_matching.py",),
        change=("return (1 - t) * x0 + t * e", "return t * x0 + (1 - t) * e")),
    Exercise(
        "Who pulls with whom", "ntk", ("per_sample_gradients", "interaction_matrix"),
        AGAIN + "Start without the chunks; the judge compares with a plain loop of autograd.",
        "Where M_ij < 0, a small step for sample i alone makes the loss of sample j larger "
        "(Eq. 10, 12).",
        ("test_all_routes_to_the_interaction_matrix_agree[foreign]",)),
    Exercise(
        "Own progress and interference", "ntk", ("loss_velocity", "sample_velocities"),
        AGAIN + "Derive Eq. 13 and 14 from dtheta/dtau = -grad L first: where does 1/N² come from, "
        "and where 1/N?",
        "A sample is made worse by its batch when the interference outweighs its own progress.",
        ("test_the_loss_falls_at_the_rate_of_the_interaction_matrix",)),
    Exercise(
        "One step for the views of a root", "sga", ("tuple_weights", "deferred_backward"),
        AGAIN + "Several backward passes, no step: the gradient must be that of one big batch. "
        "Every pass but the last is quiet.",
        "1/K_g gives every root the same weight, 1/K_max every view (Eq. 18).",
        ("test_weights_of_both_scalings",
         "test_the_deferred_step_is_one_big_step_whatever_the_sub_batches",
         "test_gradients_are_exchanged_with_the_last_sub_batch_only")),
    Exercise(
        "Noise levels and weights by granularity", "sga", ("offset_time", "min_snr_weight"),
        AGAIN + "Macro views see more noise, micro views less.",
        "With the tuples, this is all that SGA can change (Eq. 19-21).",
        ("test_time_laws_against_their_closed_form",
         "test_each_sample_gets_the_offset_of_its_granularity",
         "test_weights_begin_to_act_where_snr_is_gamma",
         "test_the_velocity_form_is_the_epsilon_form_carried_over")),
    Exercise(
        "An offset in the wrong place", "sga", ("offset_time",),
        "Suppose that the offset were added after the sigmoid instead of before. " + BREAKS,
        "A shift of the logit keeps t between 0 and 1 (Eq. 19).",
        ("test_sga.py",),
        change=("torch.sigmoid(mean + mu + ", "mu + torch.sigmoid(mean + ")),
    Exercise(
        "Images as words", "dit", ("patchify", "unpatchify"),
        AGAIN + "Row by row, and each undoes the other.",
        "A transformer sees a sequence; with a patch in the wrong place the image is in pieces.",
        ("test_networks.py::test_unpatchify_undoes_patchify",)),
    Exercise(
        "Samples that know each other", "unet", ("norm",),
        "Suppose that norm returned BatchNorm instead of GroupNorm. " + BREAKS,
        "J_i is the derivative of one sample's velocity; it has a meaning only where no sample "
        "changes another's (Eq. 10, 11).",
        ("test_networks.py",),
        change=("return nn.GroupNorm(8, channels)", "return nn.BatchNorm2d(channels)")),
    Exercise(
        "Which pairs conflict?", "ntk", ("interaction_matrix",),
        "The study probes a few roots, each in three views at three noise levels. A pair of "
        "samples is named by all that the two share: \"root view\", \"root level\", "
        "\"view level\", root, view, level or nothing. Predict which of these conflicts least, "
        "then which most, in the runs of the first base (a base is a pretrained network, from "
        "which runs of the study start).",
        "SGA chooses which pairs meet in one step, so it matters which of them conflict "
        "(Eq. 12, 18).",
        measure=conflict_by_kind),
    Exercise(
        "Does it help?", "sga", ("root_tuples", "offset_time", "min_snr_weight"),
        "The study fine-tunes with SGA and with the baseline, on equally many images, from the "
        "same base (pretrained network) and with the same seed, for several of both. Predict the "
        "final error |v - u*|²/D of SGA beside the baseline's on the roots' captions: lower (in "
        "every such pair of runs), higher (in every pair) or open. Say one of these words for the "
        "DiT, then one for the U-Net.",
        "This is the claim of the paper, with controls.",
        measure=sga_or_baseline),
)


# --- The judge ------------------------------------------------------------------------------------

def nodes(exercise):
    """The tests of an exercise as pytest names them, from the folder of the tests."""
    return [test if ".py" in test else f"test_{exercise.module}.py::{test}"
            for test in exercise.tests]


def run(tests, *options):
    """Runs tests in this process: (whether pytest is content, {name: whether it passed})."""
    passed = {}

    class Watch:
        def pytest_runtest_logreport(self, report):
            name = report.nodeid.split("::")[1].split("[")[0]
            passed[name] = passed.get(name, True) and not report.failed

    quick = ["-p", "no:cacheprovider", "-p", "no:unraisableexception", "-W", "ignore"]
    where = [str(ROOT / "tests" / test) for test in tests]
    arguments = [*quick, f"--rootdir={ROOT}", *options, *where]
    return pytest.main(arguments, plugins=[Watch()]) == 0, passed


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


def source_of(module):
    return (ROOT / f"{module}.py").read_text(encoding="utf-8")


@functools.cache
def truth(number):
    """What a prediction is compared with, found now: (right words, figures, words to choose)."""
    exercise = EXERCISES[number - 1]
    if exercise.measure:
        return exercise.measure()
    old, new = exercise.change
    source = source_of(exercise.module)
    if source.count(old) != 1:
        sys.exit(f"{exercise.module}.py has no longer what this exercise changes: {old}")
    with changed(exercise.module, source.replace(old, new)):
        _, passed = run(nodes(exercise), "-p", "no:terminal", "-k", "not demo")
    words = [name for name, fine in passed.items() if not fine]
    return words, [f"{len(words)} of {len(passed)} tests fail"], list(passed)


def judge_prediction(number, prediction):
    """0 if the prediction is right, 1 if not, 2 if it holds a word that is none of the choices.

    Only a right prediction is told what was found. A wrong one could be typed from it.
    """
    words, figures, choices = truth(number)
    unknown = [word for word in prediction if word not in choices]
    if unknown or not prediction:
        for word in unknown:
            print(f"{word!r} is none of the words to choose from")
        print("the words to choose from:", *choices, sep="\n    ")
        return 2
    in_order = EXERCISES[number - 1].measure is not None
    right = prediction == words if in_order else set(prediction) == set(words)
    if right:
        print(*figures, "right", sep="\n")
    elif in_order:
        print(f"not yet; {len(words)} words are asked for, in the order of the task")
    else:
        named, found = set(prediction), set(prediction) & set(words)
        print(f"not yet: {len(found)} of your {len(named)} tests fail, and {len(words)} in all")
    return 0 if right else 1


def judge_code(exercise):
    """0 if the tests of an exercise pass, 1 if not."""
    right, _ = run(nodes(exercise), "-q", "--tb=short", "-x")
    print("passed" if right else "not yet")
    return 0 if right else 1


def show(number, exercise):
    print(f"{number:2}. {exercise.title} ({exercise.module}.py: {', '.join(exercise.functions)})")
    print(f"    {exercise.task}")
    print(f"    Why: {exercise.why}")
    judges = ["tests/" + test for test in nodes(exercise)]
    for judge in judges or [f"results/{ROWS.name}, read when you ask"]:
        print("    Judge:", judge)
    print()


def main(arguments):
    """0 if all is right, 1 if not, 2 if the question is unclear."""
    if not arguments:
        for number, exercise in enumerate(EXERCISES, 1):
            show(number, exercise)
        return 0
    asked, *prediction = arguments
    if asked not in map(str, range(1, len(EXERCISES) + 1)):
        print(f"there is no exercise {asked}; "
              f"without a number you see the list of {len(EXERCISES)}")
        return 2
    number = int(asked)
    exercise = EXERCISES[number - 1]
    show(number, exercise)
    if exercise.is_to_write():
        return judge_code(exercise)
    return judge_prediction(number, prediction)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
