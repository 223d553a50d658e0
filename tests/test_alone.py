"""Each concept module can be copied out alone: a folder with nothing else in it is enough.

Its demo runs there, or says in one sentence which neighbours it needs. That a module's top imports
nothing but torch, torchvision and Python itself is a matter of reading: see test_house.py.
"""

import ast
import contextlib
import io
import json
import os
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = ("toy_data", "flow_matching", "ntk", "sga", "dit", "unet")


def run_alone(folders, results):
    """The work of a process of its own: runs the one file of each folder as `python FILE` does.

    It finds nothing else of this repository. What was printed and what went wrong is written down.
    """
    assert not sys.modules.keys() & set(MODULES)
    ours = (ROOT, ROOT / "tests")
    sys.path[:] = [path for path in sys.path if Path(path).resolve() not in ours]
    found = []
    for folder in folders:
        os.chdir(folder)
        file, = os.listdir()
        sys.path.insert(0, str(folder))
        sys.argv[:] = [file]
        printed, error = io.StringIO(), ""
        with contextlib.redirect_stdout(printed):
            try:
                runpy.run_path(file, run_name="__main__")
            except Exception as what:
                error = f"{type(what).__name__}: {what}"
        sys.path.remove(str(folder))
        found.append((printed.getvalue(), error))
    results.write_text(json.dumps(found), encoding="utf-8")


def source_of(name):
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


# Copies that are not enough alone: a neighbour at the top, and one that a demo takes for granted.
TWINS = {"twin_top": "import sga\n" + source_of("flow_matching"),
         "twin_demo": "def main():\n    from toy_data import views\nmain()\n"}


@pytest.fixture(scope="module")
def demos(tmp_path_factory, processes):
    """{module or twin: (its folder, what its demo printed, its error)}, all run in one process."""
    sources = {name: source_of(name) for name in MODULES} | TWINS
    folders = {name: tmp_path_factory.mktemp(name) for name in sources}
    for name, folder in folders.items():
        (folder / f"{name}.py").write_text(sources[name], encoding="utf-8")
    results = tmp_path_factory.mktemp("results") / "results.json"
    process = processes.start(run_alone, list(folders.values()), results)
    assert processes.status_of(process, 300) == 0
    found = json.loads(results.read_text(encoding="utf-8"))
    assert len(found) == len(folders)
    return {name: (folders[name], *result) for name, result in zip(folders, found)}


def test_the_demo_of_the_data_paints_a_picture_alone(demos):
    folder, printed, error = demos["toy_data"]
    assert not error
    assert "drawn: toy_data.png" in printed
    assert (folder / "toy_data.png").stat().st_size > 10_000


def test_the_demo_of_flow_matching_prints_its_equations_alone(demos):
    _, printed, error = demos["flow_matching"]
    assert not error
    numbers = [int(number) for number in re.findall(r"^Eq\. (\d+)", printed, re.M)]
    assert set(numbers) == {1, 4, 5, 6, 8, 9} and numbers == sorted(numbers)
    assert "python results/figures.py" in printed


@pytest.mark.parametrize("name", ["dit", "unet"])
def test_its_demo_prints_sizes_and_shapes_alone(demos, name):
    _, printed, error = demos[name]
    assert not error
    assert "parameters" in printed and "velocity (5, 3, 24, 24)" in printed


def neighbours_of_the_demo(name):
    """The concept modules that the functions of a module's demo import."""
    found = set()
    for function in ast.parse(source_of(name)).body:
        if re.match("main|measure_|paint_", getattr(function, "name", "")):
            for node in ast.walk(function):
                if isinstance(node, ast.Import):
                    found |= {alias.name for alias in node.names}
                if isinstance(node, ast.ImportFrom):
                    found.add(node.module)
    return found & set(MODULES)


@pytest.mark.parametrize("name", ["sga", "ntk"])
def test_its_demo_says_in_one_sentence_which_neighbours_it_needs(demos, name):
    _, printed, error = demos[name]
    assert not error
    assert printed.count("\n") == 1 and "demo needs" in printed
    needed = neighbours_of_the_demo(name)
    assert needed and not [module for module in needed if f"{module}.py" not in printed]


@pytest.mark.parametrize("name, missing", [("twin_top", "sga"), ("twin_demo", "toy_data")])
def test_a_copy_that_needs_a_neighbour_is_noticed(demos, name, missing):
    _, printed, error = demos[name]
    assert not printed
    assert error == f"ModuleNotFoundError: No module named '{missing}'"
