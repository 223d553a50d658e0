"""Each concept module can be copied out alone: a folder with nothing else in it, and at its top only torch, torchvision and Python itself."""

import ast
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = ("toy_data", "flow_matching", "ntk", "sga", "dit", "unet")
AT_TOP = {"torch", "torchvision"} | sys.stdlib_module_names

# Runs files as `python FILE` does, each in its own folder, and stops where a file itself imports what it must not; what torch imports is
# torch's affair. One process for several files, since importing torch takes seconds.
GUARD = f"""
import builtins, os, runpy, sys
def guarded(name, *rest, at_top={AT_TOP}, plain=builtins.__import__):
    code, package = sys._getframe(1).f_code, name.split(".")[0]
    allowed = at_top if code.co_name == "<module>" else at_top | {{"matplotlib", *{MODULES}}}
    if code.co_filename == file and package not in allowed:
        sys.exit(f"{{file}} imports {{package}} in {{code.co_name}}")
    return plain(name, *rest)
builtins.__import__ = guarded
folders, sys.argv[1:] = sys.argv[1:], []
for folder in folders:
    os.chdir(folder)
    file = os.listdir()[0]
    print("demo of", file, flush=True)
    runpy.run_path(file, run_name="__main__")
"""


def run_alone(*folders):
    """The demos of the files in these folders, as a finished process that finds nothing else of this repository."""
    return subprocess.run([sys.executable, "-I", "-W", "ignore", "-c", GUARD, *map(str, folders)], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"})


def copied(name, folder, before=""):
    folder.mkdir()
    (folder / f"{name}.py").write_text(before + (ROOT / f"{name}.py").read_text())
    return folder


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    """What each demo printed and the folder with its copy, by module; the slowest demo runs beside the others."""
    folders = {name: copied(name, tmp_path_factory.mktemp("alone") / name) for name in MODULES}
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda names: run_alone(*(folders[name] for name in names)), (MODULES[:1], MODULES[1:])))
    assert not any(process.returncode for process in done), done[0].stderr + done[1].stderr
    printed = dict(text.split(".py\n", 1) for process in done for text in process.stdout.split("demo of ")[1:])
    return {name: (printed[name], folder) for name, folder in folders.items()}


@pytest.mark.parametrize("name", ["toy_data", "flow_matching"])
def test_it_draws_alone(demos, name):
    printed, folder = demos[name]
    assert f"drawn: {name}.png" in printed and (folder / f"{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["dit", "unet"])
def test_it_prints_its_checks_alone(demos, name):
    assert demos[name][0].count("check:") == 2


@pytest.mark.parametrize("name", ["sga", "ntk"])
def test_it_says_in_one_sentence_which_neighbours_its_demo_needs(demos, name):
    printed, _ = demos[name]
    needed = imported(functions(tree(name))["main"]) - AT_TOP - {"matplotlib"}
    assert printed.count("\n") == 1 and "demo needs" in printed
    assert needed and not [module for module in needed if f"{module}.py" not in printed]


@pytest.mark.parametrize("first, complaint", [
    ("import numpy", "imports numpy in <module>"), ("import sga", "imports sga in <module>"), ("from train import main", "imports train in <module>"),
    ("import matplotlib.pyplot", "imports matplotlib in <module>"), ("def late():\n    import numpy\nlate()", "imports numpy in late")])
def test_what_it_must_not_import_is_refused(tmp_path, first, complaint):
    twin = run_alone(copied("flow_matching", tmp_path / "twin", first + "\n"))
    assert twin.returncode == 1 and complaint in twin.stderr


# --- the same by reading the code ---

def tree(name, more=""):
    return ast.parse((ROOT / f"{name}.py").read_text() + more)


def functions(module):
    return {node.name: node for node in module.body if isinstance(node, ast.FunctionDef)}


def imported(node):
    """The packages that a piece of code imports, anywhere in it."""
    names = [alias.name for part in ast.walk(node) if isinstance(part, ast.Import) for alias in part.names]
    return {name.split(".")[0] for name in names} | {(part.module or "").split(".")[0] for part in ast.walk(node) if isinstance(part, ast.ImportFrom)}


def outside(module, *names):
    """What a module imports outside the functions of these names."""
    return set().union(*(imported(node) for node in module.body if getattr(node, "name", None) not in names))


@pytest.mark.parametrize("name", MODULES)
def test_only_a_demo_imports_more_than_torch(name):
    demo = ("main", "bench")
    assert outside(tree(name), *demo) <= AT_TOP
    for more in ("import numpy", "if True:\n    from sga import decompose", "def f():\n    import ntk", "class A:\n    import numpy.linalg"):
        assert not outside(tree(name, more), *demo) <= AT_TOP              # twins


def test_nobody_imports_train():
    files = [file.stem for file in ROOT.glob("*.py")]
    assert set(files) >= {"train", *MODULES}
    assert not [name for name in files if "train" in imported(tree(name))]
    assert "train" in imported(tree("sga", "def f():\n    import train"))  # twin


def test_train_imports_the_six_that_it_needs():
    assert set(MODULES) <= outside(tree("train"), *functions(tree("train"))) <= AT_TOP | set(MODULES) | {"matplotlib"}
