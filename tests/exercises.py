"""Exercises in the reading order of the modules, each with its judge.

    python tests/exercises.py                         # the list
    python tests/exercises.py 3                       # the task; judges your answer, if any
    python tests/exercises.py 3 --stub                # begins an answer, runs/answers/ex_03.py
    python tests/exercises.py 5 --tests               # the words from which to predict
    python tests/exercises.py 5 test_this test_that   # compares your prediction
    python tests/exercises.py --score score.json      # judges all answers, for a grader

Functions that you write replace those of the repository while their tests run. A prediction can
stand in a file too, a word a line: runs/answers/ex_05.txt. --answers takes another folder. Answers
are programs: a grader runs those of others where they can do no harm. An answer runs in the process
that judges it, so that a score can be faked by who wants to; it helps honest students.
"""

import argparse
import contextlib
import functools
import importlib
import json
import secrets
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from exercises_sheet import EXERCISES  # noqa: E402

SECONDS = 120                                  # that a grader waits for one answer


# --- Tests, run in this process -------------------------------------------------------------------

def nodes(exercise):
    """The tests of an exercise as pytest names them, from the folder of the tests."""
    return [test if ".py" in test else f"test_{exercise.module}.py::{test}"
            for test in exercise.tests]


def kind_of_error(report):
    """The error of a test that failed, in a line; nothing of what the test computes."""
    crash = getattr(report.longrepr, "reprcrash", None)
    message = (crash.message if crash else str(report.longrepr)).partition("\n")[0]
    return "a wrong result" if message.startswith(("assert", "AssertionError")) else message


def run(tests, *options):
    """{test: its kind of error, "" if it passed}."""
    found = {}

    class Watch:
        def pytest_runtest_logreport(self, report):
            name = report.nodeid.split("::")[1].split("[")[0]
            error = kind_of_error(report) if report.failed else ""
            found[name] = found.get(name) or error

    quiet = "-W ignore -p no:cacheprovider -p no:unraisableexception -p no:terminal".split()
    named = ["-o", "python_functions=test check", f"--rootdir={ROOT}"]
    where = [str(ROOT / "tests" / test) for test in tests]
    pytest.main(quiet + named + list(options) + where, plugins=[Watch()])
    return found


@contextlib.contextmanager
def changed(name, source, file=None, without=()):
    """A module after a source was run in it: in this process alone, its file stays as it is."""
    module = importlib.import_module(name)
    before = dict(vars(module))
    try:
        for function in without:
            vars(module).pop(function, None)
        exec(compile(source, file or module.__file__, "exec"), vars(module))
        yield module
    finally:
        vars(module).clear()
        vars(module).update(before)


# --- The judges: 0 if an answer is right, 1 if not, 2 if there is none that can be judged ---------

def judge_code(exercise, file):
    """Runs the tests of an exercise, and its hidden checks, on the functions in a file."""
    tests = nodes(exercise) + [f"exercises_checks.py::{check}" for check in exercise.checks]
    names, source = exercise.names(), file.read_text(encoding="utf-8")
    loaded = set(sys.modules)
    try:
        with changed(exercise.module, source, str(file), without=names) as module:
            # An answer may have changed the tests that it loaded: they are loaded anew.
            for name in sys.modules.keys() - loaded:
                if name.startswith(("test_", "exercises_checks")):
                    del sys.modules[name]
            missing = [name for name in names if not hasattr(module, name)]
            if missing:
                raise NameError(f"it does not define {', '.join(missing)}")
            found = run(tests)
    except (Exception, SystemExit) as error:
        print(f"not yet: {file.name} cannot be judged: {type(error).__name__}: {error}")
        return 1
    passed = [name for name, error in found.items() if not error]
    for name in found.keys() - set(passed):
        print(f"    {name}: {found[name]}")
    right = len(passed) == len(tests)
    print("right:" if right else "not yet:", len(passed), "of", len(tests), "tests pass")
    return 0 if right else 1


@functools.cache
def truth(exercise):
    """What a prediction is compared with, found now: (right words, figures, words to choose)."""
    if exercise.measure:
        return exercise.measure()
    old, new = exercise.change
    source = (ROOT / f"{exercise.module}.py").read_text(encoding="utf-8")
    if source.count(old) != 1:
        sys.exit(f"{exercise.module}.py has no longer what this exercise changes: {old}")
    with changed(exercise.module, source.replace(old, new)):
        found = run(nodes(exercise), "-k", "not demo")
    words = [name for name, error in found.items() if error]
    return words, [f"{len(words)} of {len(found)} tests fail"], list(found)


def judge_prediction(exercise, prediction):
    """Only a right prediction is told what was found; another one of tests, how much is right.

    Of what was measured there are few words: to say how many are right would give them away.
    """
    words, figures, choices = truth(exercise)
    unknown = [word for word in prediction if word not in choices]
    if unknown:
        print("none of the words to choose from, which --tests lists:", *unknown)
        return 2
    in_order = exercise.measure is not None
    if prediction == words if in_order else set(prediction) == set(words):
        print(*figures, "right", sep="\n")
        return 0
    if in_order:
        print("not yet: this is not what was measured, in the order of the task")
    else:
        hits = set(prediction) & set(words)
        print(f"not yet: {len(hits)} of your {len(set(prediction))} tests fail, of {len(words)}")
    return 1


def judge(exercise, prediction, file):
    if exercise.stubs and file.exists():
        return judge_code(exercise, file)
    if file.exists() and not prediction:
        lines = file.read_text(encoding="utf-8").splitlines()
        prediction = [line.strip() for line in lines if line.strip()]
    if prediction and not exercise.stubs:
        return judge_prediction(exercise, prediction)
    hint = "--stub begins it" if exercise.stubs else "say words, of which --tests lists all"
    print(f"no answer yet: there is no {file}; {hint}")
    return 2


def judge_apart(number, folder):
    """(0, 1 or 2, what was printed) of an answer that is judged in a process of its own.

    What the process prints proves nothing, nor how it ends: the answer, too, can print and leave.
    It gets a random word in a file, which it removes before the answer is run; when all is judged,
    it writes the word again, and the result behind it.
    """
    with tempfile.TemporaryDirectory() as place:
        proof, word = Path(place) / "proof", secrets.token_bytes()
        proof.write_bytes(word)
        command = [sys.executable, __file__, str(number), "--answers", str(folder),
                   "--proof", str(proof)]
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, errors="replace",
                                  timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return 1, f"not yet: it takes more than {SECONDS} seconds\n"
        written = proof.read_bytes() if proof.is_file() else b""
    if written[:-1] != word:
        return 1, f"{done.stdout}\nnot yet: the process ended before all was judged\n"
    return written[-1], done.stdout


def score(folder):
    """The points of every answer, each judged in a process of its own."""
    rows = []
    for number, exercise in enumerate(EXERCISES, 1):
        found, passed = "no answer", False
        if answer_file(number, folder).exists():
            status, printed = judge_apart(number, folder)
            found, passed = printed.strip().split("\n")[-1], status == 0
        rows.append({"exercise": number, "title": exercise.title, "passed": passed,
                     "points": exercise.stars * passed, "of": exercise.stars, "found": found})
    points, of = (sum(row[name] for row in rows) for name in ("points", "of"))
    return {"points": points, "of": of, "exercises": rows}


# --- What a student sees --------------------------------------------------------------------------

def answer_file(number, folder):
    ending = "py" if EXERCISES[number - 1].stubs else "txt"
    return Path(folder) / f"ex_{number:02}.{ending}"


def heading(number):
    exercise = EXERCISES[number - 1]
    kind = "write" if exercise.stubs else "predict"
    return (f"{number:2}. {exercise.stars * '*':3} {exercise.minutes} min, {kind:7}  "
            f"{exercise.title} ({exercise.module}.py)")


def stub(number):
    """The beginning of an answer: what is required, in words."""
    exercise = EXERCISES[number - 1]
    blocks = [f"# {heading(number)}: its names are known here.\nimport torch\n"]
    for signature, required in exercise.stubs:
        text = textwrap.indent(textwrap.fill(f'"""{required}"""', 90), "    ")
        blocks.append(f"def {signature}:\n{text}\n    raise NotImplementedError\n")
    return "\n\n".join(blocks)


def main(arguments=None):
    """0 if all is right, 1 if not, 2 if there is nothing that can be judged."""
    parser = argparse.ArgumentParser(description="Without an argument: the list of exercises.")
    parser.add_argument("exercise", nargs="?", help="its number")
    parser.add_argument("words", nargs="*", help="a prediction, for an exercise that asks for one")
    parser.add_argument("--stub", action="store_true", help="begin an answer")
    parser.add_argument("--tests", action="store_true", help="list the tests, or words to choose")
    parser.add_argument("--answers", metavar="FOLDER", default=ROOT / "runs/answers",
                        help="where your answers are (runs/answers)")
    parser.add_argument("--score", metavar="FILE", help="judge all answers, and write JSON")
    parser.add_argument("--proof", type=Path, help=argparse.SUPPRESS)      # of judge_apart
    asked = parser.parse_intermixed_args(arguments)
    if asked.score:
        text = json.dumps(score(asked.answers), indent=1)
        Path(asked.score).write_text(text, encoding="utf-8")
        return 0
    numbers = range(1, len(EXERCISES) + 1)
    if asked.exercise is None:
        print(*map(heading, numbers), sep="\n")
        return 0
    if asked.exercise not in map(str, numbers):
        print(f"there is no exercise {asked.exercise}; without a number you see the list")
        return 2
    number = int(asked.exercise)
    exercise, file = EXERCISES[number - 1], answer_file(number, asked.answers)
    if asked.proof:
        word = asked.proof.read_bytes()
        asked.proof.unlink()
        status = judge(exercise, asked.words, file)
        asked.proof.write_bytes(word + bytes([status]))
        return status
    print(heading(number), textwrap.fill(exercise.task, 96), sep="\n")
    for signature, requirement in exercise.stubs:
        print(f"    {signature}", textwrap.indent(textwrap.fill(requirement, 90), "        "),
              sep="\n")
    if asked.tests:
        listed = nodes(exercise) + list(exercise.checks) if exercise.stubs else truth(exercise)[2]
        print(*listed, sep="\n")
        return 0
    if asked.stub and exercise.stubs and not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(stub(number), encoding="utf-8")
        print("your answer begins in", file)
        return 0
    if exercise.stubs and file.exists():
        status, printed = judge_apart(number, asked.answers)
        print(printed, end="")
        return status
    return judge(exercise, asked.words, file)


if __name__ == "__main__":
    sys.exit(main())
