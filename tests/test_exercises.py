"""The judge of the exercises: for each of them a right answer passes, and a plausible wrong one, a
stub and a missing function do not. Nothing that is printed gives an answer away.
"""

import ast
import importlib
import inspect
import json
import sys

import pytest

import exercises
import exercises_sheet as sheet

EXERCISES = exercises.EXERCISES
TITLED = {exercise.title: number for number, exercise in enumerate(EXERCISES, 1)}
TO_WRITE = [exercise.title for exercise in EXERCISES if exercise.stubs]
TO_BREAK = [exercise.title for exercise in EXERCISES if exercise.change]
MEASURED = [exercise.title for exercise in EXERCISES if exercise.measure]


def exercise_of(title):
    return EXERCISES[TITLED[title] - 1]


def predict(title, *words):
    """What exercises.py answers to a prediction."""
    return exercises.main([str(TITLED[title]), *words, "--answers", "no folder"])


@pytest.fixture
def here(monkeypatch):
    """Answers are judged in this process: one of its own for each would take a minute."""
    def judge(number, folder):
        file = exercises.answer_file(number, folder)
        return exercises.judge(EXERCISES[number - 1], [], file), ""

    monkeypatch.setattr(exercises, "judge_apart", judge)


# --- The list -------------------------------------------------------------------------------------

def test_the_list_shows_every_exercise_with_its_stars_and_minutes(capsys):
    assert exercises.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(EXERCISES) == len(TITLED)
    for line, exercise in zip(lines, EXERCISES):
        assert 1 <= exercise.stars == line.count("*") <= 3
        assert f" {exercise.minutes} min" in line and exercise.title in line
        ways = (exercise.stubs, exercise.change, exercise.measure)
        assert sum(map(bool, ways)) == 1


@pytest.mark.parametrize("unknown", ["99", "0", "-1", "path"])
def test_an_unknown_exercise_is_named(unknown, capsys):
    assert exercises.main([unknown]) == 2
    assert f"there is no exercise {unknown}" in capsys.readouterr().out


# --- Write functions ------------------------------------------------------------------------------
# The right answers are the repository's own functions, and these, which the repository lacks.

SOLUTIONS = {
    "A step on one image": """
def influence(f, params, inputs, residuals, j):
    only_j = torch.zeros_like(residuals)
    only_j[j] = residuals[j]
    return -ntk_vector_product(f, params, inputs, only_j)


def hurt(f, params, inputs, residuals, j):
    M = interaction_matrix(f, params, inputs, residuals)
    return [i for i in range(len(M)) if M[i, j] < 0]
""",
    "From a learning rate to a time": """
def training_time(eta, steps, D):
    return 2 * eta * steps / D
""",
    "Signs under AdamW": """
def flipped(G, v, eps):
    by_adamw = G / (v.sqrt() + eps) @ G.T
    return by_adamw.sign() != (G @ G.T).sign()
""",
    "Break the fast route, then guard it": """
class Backwards(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(x).tanh() * self.layer.weight.norm()


def broken():
    torch.manual_seed(0)
    return Backwards().double(), (torch.randn(5, 3).double(),), torch.randn(5, 3).double()


def guard(model, inputs, residuals, M):
    v = model(*inputs)
    s = torch.randn(len(v), dtype=v.dtype)
    vectors = s.view(-1, *[1] * (v.dim() - 1)) * residuals
    g = torch.autograd.grad(v, list(model.parameters()), vectors)
    by_gradient = sum(one.square().sum() for one in g)
    size = s.abs() @ M.abs() @ s.abs()
    if (s @ M @ s - by_gradient).abs() > torch.finfo(v.dtype).eps ** (2 / 3) * size:
        raise ValueError("M is wrong")
""",
    "One factor or two": """
def weighted_velocities(M, a):
    own = -M @ a
    return a @ own, own, own.mean()
""",
    "What meeting changes": """
def every_step(root, meet):
    own = [tuple(torch.nonzero(root == one)[:, 0].tolist()) for one in root.unique()]
    any_views = list(itertools.combinations(range(len(root)), len(own[0])))
    steps = own if meet == "root" else any_views
    a = torch.zeros(len(steps), len(root), dtype=torch.float64)
    for row, views in zip(a, steps):
        row[list(views)] = 1 / len(views)
    return a
""",
}

# What a student may well do, in the place of what is right.
MISTAKES = {
    "From data to noise": [("(1 - t) * x0 + t * e", "t * x0 + (1 - t) * e")],
    "From noise to data": [("(v + v_next) / 2", "v_next")],
    "The best possible velocity": [("log_pi - energy", "log_pi[:1] - energy")],
    "Groups of data interact": [("delta @ delta.mT", "(delta @ delta.mT).abs()")],
    "Who pulls with whom": [("_parts(*columns, chunk)", "_parts(inputs, residuals, chunk)")],
    "A step on one image": [
        ("M[i, j] < 0", "residuals[i].flatten() @ residuals[j].flatten() < 0")],
    "Own progress and interference": [("-cross / N**2", "-cross / N")],
    "From a learning rate to a time": [("2 * eta", "eta")],
    # In the second, both gradients are divided.
    "Signs under AdamW": [("v.sqrt()", "v"), ("+ eps)", "+ eps)**2")],
    "Break the fast route, then guard it": [
        ("torch.randn(len(v), ", "torch.ones(len(v), "),
        ("torch.randn(len(v), ", "torch.arange(1, len(v) + 1, ")],
    # In the first the context is never left, so that the last pass is quiet, too.
    "One step for the views of a root": [
        ("with exchange:", "exchange.__enter__()\n        if True:"),
        ("full_like(sizes, k_max)", "full_like(sizes, 3)")],
    "Noise levels and weights by granularity": [
        ("shift * t / (1", "t / (1"),
        ('_table(offsets, "', '_table(OFFSETS, "'),
        ('_table(gammas, "', '_table(GAMMAS, "'),
        ("generator=generator, ", ""),
        ("generator=generator, ", "generator=torch.Generator().manual_seed(0), ")],
    "One factor or two": [("own = -M @ a", "own = -a * (M @ a)")],
    "What meeting changes": [("1 / len(views)", "1"), ("len(own[0])", "2")],
}


def right_answer(title):
    """A file that answers an exercise, from the repository's functions where it has them."""
    exercise = exercise_of(title)
    source = (exercises.ROOT / f"{exercise.module}.py").read_text(encoding="utf-8")
    found = [SOLUTIONS.get(title, "")]
    for node in ast.parse(source).body:
        if getattr(node, "name", None) in exercise.names():
            decorators = [f"@{ast.unparse(one)}\n" for one in node.decorator_list]
            found.append("".join(decorators) + ast.get_source_segment(source, node))
    return "\n\n\n".join(["import itertools\n", *found])


def judged(title, text, folder):
    """What exercises.py answers to a file."""
    (folder / f"ex_{TITLED[title]:02}.py").write_text(text, encoding="utf-8")
    return exercises.main([str(TITLED[title]), "--answers", str(folder)])


@pytest.mark.parametrize("title", TO_WRITE)
def test_a_right_answer_passes_and_a_wrong_one_does_not(title, tmp_path, capsys, here):
    module = importlib.import_module(exercise_of(title).module)
    before = dict(vars(module))
    right = right_answer(title)
    assert judged(title, right, tmp_path) == 0
    assert "\nright: " in capsys.readouterr().out
    for old, new in MISTAKES[title]:
        assert right.count(old) == 1
        assert judged(title, right.replace(old, new), tmp_path) == 1
        printed = capsys.readouterr().out
        assert "\nnot yet: " in printed and "Error:" not in printed
    assert vars(module) == before                  # the answer is gone


CHANGES_ITS_CHECK = """
import exercises_checks

def training_time(eta, steps, D):
    return 0.0

def passes(*arguments):
    return True

exercises_checks.near = passes
exercises_checks.check_training_time_is_that_of_the_frozen_kernel = passes
"""


def test_an_answer_that_changes_its_check_does_not_pass(tmp_path, monkeypatch, here):
    # As in a process of its own, the answer is the first that loads it.
    monkeypatch.delitem(sys.modules, "exercises_checks", raising=False)
    assert judged("From a learning rate to a time", CHANGES_ITS_CHECK, tmp_path) == 1


def test_a_stub_states_what_is_required_and_does_not_pass(tmp_path, capsys, here):
    title = "From data to noise"
    asked = [str(TITLED[title]), "--answers", str(tmp_path / "mine")]
    assert exercises.main(asked) == 2              # no answer yet
    assert exercises.main([*asked, "--stub"]) == 0
    text = (tmp_path / f"mine/ex_{TITLED[title]:02}.py").read_text(encoding="utf-8")
    for signature, required in exercise_of(title).stubs:
        assert f"def {signature}:" in text
        assert " ".join(required.split()[:5]) in text
    assert exercises.main([*asked, "--stub"]) == 1     # nothing is overwritten
    printed = capsys.readouterr().out
    assert printed.count(": NotImplementedError\n") == len(exercise_of(title).tests)
    assert printed.endswith("not yet: 0 of 4 tests pass\n")


@pytest.mark.parametrize("title", TO_WRITE)
def test_stubs_have_the_signatures_of_the_repository_and_the_checks_exist(title):
    exercise = exercise_of(title)
    module = importlib.import_module(exercise.module)
    compile(exercises.stub(TITLED[title]), "stub", "exec")
    for name, (signature, _) in zip(exercise.names(), exercise.stubs):
        if title not in SOLUTIONS or hasattr(module, name):
            own = inspect.signature(getattr(module, name)).parameters
            asked = signature[:-1].partition("(")[2].split(", ")
            assert [word.partition("=")[0] for word in asked] == list(own)
    checks = importlib.import_module("exercises_checks")
    assert all(hasattr(checks, check) for check in exercise.checks)
    assert exercise.tests or exercise.checks


BROKEN = {
    "def path(x0, e, t):\n    return x0": "does not define target, residual, loss",
    "def path(x0, e, t)": "SyntaxError",
    "raise SystemExit(0)": "SystemExit",
    "import nothing_of_that_name": "No module named",
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_file_that_cannot_be_judged_does_not_pass(text, tmp_path, capsys, here):
    assert judged("From data to noise", text, tmp_path) == 1
    assert BROKEN[text] in capsys.readouterr().out


# --- Predict --------------------------------------------------------------------------------------

@pytest.mark.parametrize("title", TO_BREAK)
def test_only_the_tests_that_a_change_breaks_are_right(title, capsys):
    module = importlib.import_module(exercise_of(title).module)
    before = dict(vars(module))
    words, figures, tests = exercises.truth(exercise_of(title))
    assert vars(module) == before                  # the change is undone
    assert words and len(words) < len(tests)

    innocent = next(name for name in tests if name not in words)
    assert predict(title, *words) == predict(title, *words[::-1]) == 0
    assert capsys.readouterr().out.count(f"{figures[0]}\nright\n") == 2
    assert predict(title, *words[1:], innocent) == predict(title, *words, innocent) == 1
    assert predict(title) == predict(title, "nonsense", *words[1:]) == 2
    printed = capsys.readouterr().out
    assert f"not yet: {len(words)} of your {len(words) + 1} tests fail, of {len(words)}" in printed
    assert not [name for name in tests if name in printed]
    assert exercises.main([str(TITLED[title]), "--tests"]) == 0
    assert capsys.readouterr().out.endswith("\n".join(tests) + "\n")


@pytest.mark.parametrize("title", MEASURED)
def test_only_the_measured_words_in_their_order_are_right(title, capsys):
    words, figures, choices = exercises.truth(exercise_of(title))
    assert predict(title, *words) == 0
    assert "\n".join([*figures, "right"]) in capsys.readouterr().out
    other = next(word for word in choices if word not in words)
    assert predict(title, words[0], other) == predict(title, *words, words[0]) == 1
    assert predict(title, other, other) == 1
    assert predict(title, "nonsense", words[1]) == predict(title) == 2
    printed = capsys.readouterr().out
    # Nobody is told whether one of the two words is right.
    assert printed.count("not yet: this is not what was measured, in the order") == 3
    assert "words are right" not in printed
    assert "which --tests lists: nonsense\n" in printed
    assert not [line for line in figures if line in printed]


def other_world(rows, changes):
    """Rows in which pairs conflict where they did not, and SGA has other errors, if `changes`."""
    for row in filter(changes, rows):
        for point in row["probe"]:
            for pairs in point["pairs"].values():
                pairs["conflict"] = 1 - pairs["conflict"]
        # The bases differ by more than the arms: runs of two bases must not be compared.
        gap = -1.0 if row["model"] == "dit" else (-1.0) ** row["seed"]
        for part in row["rows"]:
            part["error"] = 100.0 * row["base"] + (gap if row["arm"] == "sga" else 0.0)
    return "\n".join(map(json.dumps, rows))


def test_the_first_base_decides_and_neither_this_file_nor_another_base(tmp_path, monkeypatch):
    rows = [json.loads(line) for line in sheet.ROWS.read_text(encoding="utf-8").splitlines()]
    first = min(row["base"] for row in rows)
    kinds, _, choices = sheet.conflict_by_kind()
    assert choices == sorted(choices)              # their order says nothing of the answer
    before = sheet.sga_or_baseline()[0]
    assert set(kinds) < set(rows[0]["probe"][0]["pairs"]) == set(choices)

    monkeypatch.setattr(sheet, "ROWS", tmp_path / "rows.jsonl")
    for changes, least_and_most, words in (
            (lambda row: row["base"] != first, kinds, before),
            (lambda row: row["base"] == first, kinds[::-1], ["lower", "open"])):
        text = other_world(rows, changes)
        sheet.ROWS.write_text(text, encoding="utf-8")
        assert sheet.conflict_by_kind()[0] == least_and_most
        found, figures, _ = sheet.sga_or_baseline()
        assert found == words
    assert not [line for line in figures if "100" in line or "99" in line]


# --- The score ------------------------------------------------------------------------------------

# It also writes what it may to the file in which the judge proves that it came to its end.
ENDS_ITS_JUDGE = """
import os, pathlib, sys

print("right: 4 of 4 tests pass", flush=True)
pathlib.Path(sys.argv[-1]).write_bytes(bytes(33))
os._exit(0)
"""


def test_the_score_has_the_points_of_every_answer(tmp_path, monkeypatch):
    pairs, helps = MEASURED
    words, _, _ = exercises.truth(exercise_of(pairs))
    ends = "From data to noise"
    answers = {pairs: "\n".join(words), helps: "nonsense", ends: ENDS_ITS_JUDGE}
    for title, text in answers.items():
        file = exercises.answer_file(TITLED[title], tmp_path)
        file.write_text(text + "\n", encoding="utf-8")
    asked = ["--answers", str(tmp_path), "--score", str(tmp_path / "score.json")]
    assert exercises.main(asked) == 0
    found = json.loads((tmp_path / "score.json").read_text(encoding="utf-8"))
    rows = {row["title"]: row for row in found["exercises"]}
    assert list(rows) == list(TITLED)
    assert found["points"] == rows[pairs]["points"] == exercise_of(pairs).stars
    assert found["of"] == sum(exercise.stars for exercise in EXERCISES)
    assert [title for title, row in rows.items() if row["passed"]] == [pairs]
    assert "nonsense" in rows[helps]["found"]
    assert rows[ends]["found"] == "not yet: the process ended before all was judged"
    assert rows["From noise to data"]["found"] == "no answer"

    monkeypatch.setattr(exercises, "SECONDS", 0)
    assert exercises.score(tmp_path)["points"] == 0    # an answer without an end
