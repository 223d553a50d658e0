"""The judge of the exercises: it passes what is in the repository, fails what is deleted or half
right, and tells right predictions from wrong ones without giving the answer away.
"""

import ast
import importlib
import json

import pytest

import exercises

NUMBERED = list(enumerate(exercises.EXERCISES, 1))
TO_WRITE = [number for number, exercise in NUMBERED if exercise.is_to_write()]
TO_BREAK = [number for number, exercise in NUMBERED if exercise.change]
MEASURED = [number for number, exercise in NUMBERED if exercise.measure]


def exercise_of(number):
    return exercises.EXERCISES[number - 1]


def number_of(title):
    return next(number for number, exercise in NUMBERED if exercise.title == title)


def answer(number, *prediction):
    return exercises.main([str(number), *prediction])


def test_the_list_shows_every_exercise(capsys):
    assert exercises.main([]) == 0
    printed = capsys.readouterr().out
    shown = [line[:2] for line in printed.splitlines() if line[2:4] == ". "]
    assert shown == [f"{number:2}" for number, _ in NUMBERED]
    assert len(NUMBERED) == 15
    for _, exercise in NUMBERED:
        assert exercise.title in printed and exercise.task in printed and exercise.why in printed
        module = importlib.import_module(exercise.module)
        assert all(hasattr(module, name) for name in exercise.functions)


@pytest.mark.parametrize("unknown", ["99", "0", "-1", "path"])
def test_an_unknown_exercise_is_named(unknown, capsys):
    assert exercises.main([unknown]) == 2
    assert f"there is no exercise {unknown}" in capsys.readouterr().out


# --- Write a function again -----------------------------------------------------------------------

def test_what_is_in_the_repository_passes(capsys):
    """All judges at once, and one of them as a student runs it."""
    judges = [node for number in TO_WRITE for node in exercises.nodes(exercise_of(number))]
    content, passed = exercises.run(judges, "-p", "no:terminal")
    assert content and all(passed.values())
    assert len(passed) == len({node.split("::")[1] for node in judges})
    assert answer(number_of("From data to noise")) == 0
    assert capsys.readouterr().out.endswith("passed\n")


def without_body(module, function):
    """The module's source with nothing but the docstring left of a function."""
    source = exercises.source_of(module)
    tree = ast.parse(source)
    node, = (node for node in tree.body if getattr(node, "name", None) == function)
    assert ast.get_docstring(node) and len(node.body) > 1
    lines = source.splitlines()
    docstring, *_, last = node.body
    del lines[docstring.end_lineno:last.end_lineno]
    return "\n".join(lines)


DELETED = [(number, name) for number in TO_WRITE for name in exercise_of(number).functions]


@pytest.mark.parametrize("number, function", DELETED)
def test_a_deleted_body_does_not_pass(number, function, capsys):
    module = exercise_of(number).module
    with exercises.changed(module, without_body(module, function)):
        assert answer(number) == 1
    assert capsys.readouterr().out.endswith("not yet\n")


# Wrong in one respect each: what a student may well forget.
HALF_RIGHT = {
    "The best possible velocity": """
whole_posterior, whole_velocity = posterior, exact_velocity
def of_all_alike(pi):
    return pi if pi is None or torch.as_tensor(pi).dim() == 1 else None
def posterior(x, t, points, pi=None):
    return whole_posterior(x, t, points, of_all_alike(pi))
def exact_velocity(x, t, points, pi=None):
    return whole_velocity(x, t, points, of_all_alike(pi))
""",
    "One step for the views of a root": """
whole_backward = deferred_backward
def deferred_backward(losses, sub_batches, quiet=contextlib.nullcontext):
    with quiet():
        return whole_backward(losses, sub_batches)
""",
}


@pytest.mark.parametrize("title", HALF_RIGHT)
def test_a_solution_that_forgets_one_case_does_not_pass(title, capsys):
    """Weights pi of (N, K) that are ignored; a last backward pass that is quiet, too."""
    module = exercise_of(number_of(title)).module
    with exercises.changed(module, exercises.source_of(module) + HALF_RIGHT[title]):
        assert answer(number_of(title)) == 1
    assert capsys.readouterr().out.endswith("not yet\n")


# --- Predict which tests a change breaks ----------------------------------------------------------

@pytest.mark.parametrize("number", TO_BREAK)
def test_only_the_tests_that_a_change_breaks_are_right(number, capsys):
    module = importlib.import_module(exercise_of(number).module)
    before = dict(vars(module))
    words, figures, tests = exercises.truth(number)
    assert vars(module) == before              # the change is undone
    assert words and len(words) < len(tests)

    innocent = next(name for name in tests if name not in words)
    assert answer(number, *words) == answer(number, *words[::-1]) == 0
    assert capsys.readouterr().out.count(f"{figures[0]}\nright\n") == 2
    assert answer(number, *words[1:], innocent) == answer(number, *words, innocent) == 1
    assert answer(number, *words[:-1], *[innocent][len(words) - 1:]) == 1
    assert not [name for name in words if name in capsys.readouterr().out]


@pytest.mark.parametrize("number", TO_BREAK[:1])
def test_the_names_of_the_tests_are_listed_on_request(number, capsys):
    _, _, tests = exercises.truth(number)
    assert answer(number) == 2
    assert "the words to choose from:\n    " + "\n    ".join(tests) in capsys.readouterr().out


# --- Predict what was measured --------------------------------------------------------------------

@pytest.mark.parametrize("number", MEASURED)
def test_only_the_measured_words_in_their_order_are_right(number, capsys):
    words, figures, choices = exercises.truth(number)
    assert answer(number, *words) == 0
    assert "\n".join([*figures, "right"]) in capsys.readouterr().out
    other = next(word for word in choices if word not in words)
    wrong = [(words[0],), (*words, words[0]), (other, words[1]), (words[0], other)]
    wrong += [words[::-1]] if words != words[::-1] else []
    assert [answer(number, *prediction) for prediction in wrong] == [1] * len(wrong)
    assert not [line for line in figures if line in capsys.readouterr().out]


@pytest.mark.parametrize("number", [*TO_BREAK[:1], *MEASURED])
def test_a_nonsense_word_is_not_answered(number, capsys):
    words, figures, _ = exercises.truth(number)
    assert answer(number, "nonsense", *words[1:]) == 2
    printed = capsys.readouterr().out
    assert "'nonsense' is none of the words to choose from" in printed
    assert not [line for line in figures if line in printed]
    assert not printed.endswith("right\n")


def other_world(rows):
    """Rows in which pairs conflict where they did not, and SGA has other errors."""
    for row in rows:
        for point in row["probe"]:
            for pairs in point["pairs"].values():
                pairs["conflict"] = 1 - pairs["conflict"]
        gap = -1.0 if row["model"] == "dit" else (-1.0) ** row["seed"]
        # The bases differ by more than the arms: runs of two bases must not be compared.
        error = 100.0 * row["base"] + (gap if row["arm"] == "sga" else 0.0)
        for part in row["rows"]:
            part["error"] = error
    return rows


def test_what_was_measured_decides_and_not_this_file(tmp_path, monkeypatch):
    rows = exercises.study()
    kinds, _, choices = exercises.conflict_by_kind()
    assert set(kinds) < set(rows[0]["probe"][0]["pairs"]) == set(choices)
    lines = [json.dumps(row) for row in other_world(rows)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr(exercises, "ROWS", tmp_path / "rows.jsonl")
    assert exercises.conflict_by_kind()[0] == kinds[::-1]
    words, figures, _ = exercises.sga_or_baseline()
    assert words == ["lower", "open"]
    assert figures[0].count("-1.0000") == sum(row["model"] == "dit" and row["arm"] == "sga"
                                              for row in rows)


def test_rows_of_another_base_change_no_prediction(tmp_path, monkeypatch):
    """Exercise 14 is about one base, and exercise 15 compares runs of the same base alone."""
    rows = exercises.study()
    kinds, _, _ = exercises.conflict_by_kind()
    gaps = exercises.sga_or_baseline()[1]
    for row in rows:
        if row["base"] == max(row["base"] for row in rows) != 0:
            for point in row["probe"]:
                for pairs in point["pairs"].values():
                    pairs["conflict"] = 1 - pairs["conflict"]
            for part in row["rows"]:
                part["error"] += 100.0
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr(exercises, "ROWS", tmp_path / "rows.jsonl")
    assert exercises.conflict_by_kind()[0] == kinds
    assert exercises.sga_or_baseline()[1] == gaps
