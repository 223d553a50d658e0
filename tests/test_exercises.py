"""The judge of the exercises: it passes what is in the repository, fails what is deleted, and tells right predictions from wrong ones."""

import ast
import importlib
import json

import pytest

import exercises

NUMBERED = list(enumerate(exercises.EXERCISES, 1))
TO_WRITE = [(number, exercise) for number, exercise in NUMBERED if not exercise.change and not exercise.measure]
TO_BREAK = [(number, exercise) for number, exercise in NUMBERED if exercise.change]


def without_body(module, function):
    """The module's source with nothing but the docstring left of a function."""
    tree = ast.parse((exercises.ROOT / f"{module}.py").read_text())
    node, = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)
    assert ast.get_docstring(node) and len(node.body) > 1
    node.body = node.body[:1]
    return ast.unparse(tree)


def test_the_list_shows_every_exercise(capsys):
    assert exercises.main([]) == 0
    printed = capsys.readouterr().out
    assert len(NUMBERED) >= 8 and [line[:2] for line in printed.splitlines() if line[2:4] == ". "] == [f"{number:2}" for number, _ in NUMBERED]
    for _, exercise in NUMBERED:
        assert exercise.title in printed and exercise.task in printed and exercise.why in printed
        assert all(hasattr(importlib.import_module(exercise.module), name) for name in exercise.functions.split(", "))


@pytest.mark.parametrize("number, exercise", TO_WRITE)
def test_what_is_in_the_repository_passes(number, exercise, capsys):
    assert exercises.main([str(number)]) == 0
    assert capsys.readouterr().out.endswith("passed\n")


@pytest.mark.parametrize("number, function", [(number, name) for number, exercise in TO_WRITE for name in exercise.functions.split(", ")])
def test_a_deleted_body_does_not_pass(number, function, capsys):
    module = exercises.EXERCISES[number - 1].module
    with exercises.changed(module, without_body(module, function)):
        assert exercises.main([str(number)]) == 1
    assert capsys.readouterr().out.endswith("not yet\n")


@pytest.mark.parametrize("number, exercise", TO_BREAK)
def test_only_the_tests_that_a_change_breaks_are_right(number, exercise, capsys):
    module = importlib.import_module(exercise.module)
    before = dict(vars(module))
    words, _, tests = exercises.truth(number)
    assert vars(module) == before                                          # the change is undone
    assert words and len(words) < len(tests)
    innocent = next(name for name in tests if name not in words)
    answer = lambda *prediction: exercises.main([str(number), *prediction])
    assert answer(*words) == answer(*words[::-1]) == 0
    assert answer(*words[1:], innocent) == answer(*words, innocent) == answer(*words, "test_nothing") == 1
    assert "there is no test 'test_nothing'" in capsys.readouterr().out
    assert answer() == 2 and answer(*words[:-1]) == (1 if words[1:] else 2)


def test_what_was_measured_decides_and_not_this_file(tmp_path, monkeypatch):
    rows = exercises.study()
    kinds, _ = exercises.conflict_by_kind()
    assert set(kinds) < set(rows[0]["probe"][0]["pairs"]) and exercises.sga_or_baseline()[0]
    for row in rows:                                                       # twin: another world
        for point in row["probe"]:
            point["pairs"] = {kind: {"conflict": 1 - pair["conflict"]} for kind, pair in point["pairs"].items()}
        for part in row["rows"]:
            part["error"] = {"sga": -1.0 if row["model"] == "dit" else (-1) ** row["seed"], "baseline": 0.0}.get(row["arm"], part["error"])
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(exercises, "ROWS", tmp_path / "rows.jsonl")
    assert exercises.conflict_by_kind()[0] == kinds[::-1]
    assert exercises.sga_or_baseline()[0] == ["lower", "open"]


@pytest.mark.parametrize("number", [number for number, exercise in NUMBERED if exercise.measure])
def test_only_the_measured_words_in_their_order_are_right(number, capsys):
    words, figures, _ = exercises.truth(number)
    answer = lambda *prediction: exercises.main([str(number), *prediction])
    assert answer(*words) == 0
    assert "\n".join([*figures, "right"]) in capsys.readouterr().out
    assert answer(words[0]) == answer(*words, words[0]) == answer("nonsense", words[1]) == 1
    assert answer() == 2
    assert (answer(*words[::-1]) == 0) == (words == words[::-1])


def test_an_unknown_exercise_is_named(capsys):
    assert exercises.main(["99"]) == exercises.main(["-1"]) == exercises.main(["path"]) == 2
    assert "there is no exercise path" in capsys.readouterr().out
