"""The house rules that a program can keep: the width of a line, and who may import whom.

Each rule is a function from a source to what is wrong in it. It is run on every Python file of the
repository, and on a small source that breaks it, which it must notice.
"""

import ast
import functools
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WIDTH = 100

CONCEPTS = {"toy_data", "flow_matching", "ntk", "sga", "dit", "unet"}
TORCH = {"torch", "torchvision"} | sys.stdlib_module_names
DEMO = re.compile(r"main|measure_\w+|paint_\w+")


def python_files():
    """The Python files of the repository, by their path: those that git knows or would take."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    git = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    names = git.stdout.splitlines()
    if git.returncode != 0:                    # a copy without its history
        folders = (ROOT, ROOT / "support", ROOT / "results", ROOT / "tests")
        found = [file for folder in folders for file in folder.glob("*.py")]
        names = [file.relative_to(ROOT).as_posix() for file in found]
    return sorted(name for name in names if (ROOT / name).exists())


FILES = python_files()


def source_of(file):
    return (ROOT / file).read_text(encoding="utf-8")


@functools.cache
def tree_of(source):
    """The syntax tree of a source, which several rules look at. Nobody changes it."""
    return ast.parse(source)


def test_the_files_of_the_house_are_found():
    known = {"train.py", "support/report.py", "results/study.py", "tests/test_house.py"}
    assert known <= set(FILES)


# --- Style ----------------------------------------------------------------------------------------

def too_wide(source):
    """The numbers of the lines with more than WIDTH characters."""
    return [k for k, line in enumerate(source.splitlines(), 1) if len(line) > WIDTH]


def lambdas_with_a_name(source):
    """The lines where a lambda is assigned to a name. A function with a name is a def."""
    lines = []
    for node in ast.walk(tree_of(source)):
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)):
            several = isinstance(node.value, (ast.Tuple, ast.IfExp))
            values = ast.iter_child_nodes(node.value) if several else [node.value]
            if any(isinstance(value, ast.Lambda) for value in values):
                lines.append(node.lineno)
    return lines


def evals(source):
    """The lines that name eval, which runs whatever a text says."""
    names = [node for node in ast.walk(tree_of(source)) if isinstance(node, ast.Name)]
    return [node.lineno for node in names if node.id == "eval"]


def without_encoding(source):
    """The lines that read or write text in whatever encoding the machine happens to have."""
    calls = [node for node in ast.walk(tree_of(source)) if isinstance(node, ast.Call)]
    return [call.lineno for call in calls if opens_a_file(call) and not says_how(call)]


def opens_a_file(call):
    """Whether a call is open(...), or open, read_text or write_text of a path."""
    function = call.func
    if isinstance(function, ast.Name):
        return function.id == "open"
    if not isinstance(function, ast.Attribute):
        return False
    of_the_system = isinstance(function.value, ast.Name) and function.value.id == "os"
    return function.attr in ("open", "read_text", "write_text") and not of_the_system


def says_how(call):
    """Whether a call that opens a file names utf-8, or the binary mode."""
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    encoding = named.get("encoding")
    if isinstance(encoding, ast.Constant) and encoding.value == "utf-8":
        return True
    place = 1 if isinstance(call.func, ast.Name) else 0
    mode = named.get("mode", call.args[place] if len(call.args) > place else None)
    return isinstance(mode, ast.Constant) and "b" in str(mode.value)


STYLE = (too_wide, lambdas_with_a_name, evals, without_encoding)
BREAKS_STYLE = (
    (too_wide, "x = 1\ny = '" + "-" * 95 + "'\n"),
    (lambdas_with_a_name, "x = 1\nf = lambda y: y\n"),
    (lambdas_with_a_name, "x = 1\nf: object = lambda y: y\n"),
    (lambdas_with_a_name, "x = 1\nf, z = lambda y: y, 2\n"),
    (lambdas_with_a_name, "x = 1\nf = (lambda y: y) if x else None\n"),
    (evals, "x = 1\ny = eval('x')\n"),
    (evals, "x = 1\ny = map(eval, 'x')\n"),
    (without_encoding, "from pathlib import Path\nPath('a').read_text()\n"),
    (without_encoding, "from pathlib import Path\nPath('a').write_text('text', encoding=None)\n"),
    (without_encoding, "from pathlib import Path\nPath('b').open()\n"),
    (without_encoding, "x = 1\nopen('a', 'w')\n"),
    (without_encoding, "x = 1\nopen('b')\n"),
    (without_encoding, "x = 1\nopen('a', encoding='latin-1')\n"),
)
KEEPS_STYLE = """
widest = '-----------------------------------------------------------------------------------------'
words.sort(key=lambda word: word.lower())
model.eval()
open("a", "rb"), open("a", mode="wb"), open("a", encoding="utf-8"), os.open("a", os.O_RDONLY)
Path("a").read_text(encoding="utf-8"), Path("a").open("rb"), Path("a").read_bytes()
"""


@pytest.mark.parametrize("rule", STYLE)
def test_every_file_keeps_the_style(rule):
    found = {file: rule(source_of(file)) for file in FILES}
    broken = {file: lines for file, lines in found.items() if lines}
    assert not broken, rule.__doc__


@pytest.mark.parametrize("rule, source", BREAKS_STYLE)
def test_what_breaks_the_style_is_noticed(rule, source):
    assert rule(source) == [2]
    assert rule(KEEPS_STYLE) == []


# --- Arrows go down only --------------------------------------------------------------------------

def imported(node, package=""):
    """What a piece of code imports, anywhere in it: {"torch", "support.book", ...}."""
    names = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Import):
            names |= {alias.name for alias in part.names}
        if isinstance(part, ast.ImportFrom):
            module = part.module or package
            if module == "support":            # from support import book
                names |= {f"support.{alias.name}" for alias in part.names}
            else:
                names.add(module)
    return names


def packages(node):
    """The packages that a piece of code imports: {"torch", "support", ...}."""
    return {name.split(".")[0] for name in imported(node)}


def forbidden_imports(file, source):
    """What a file imports although it must not.

    A concept module imports torch and Python's own modules. Its demo, the functions named main,
    measure_... and paint_..., may also import matplotlib and the neighbours. support imports the
    concepts and itself, and train imports the concepts and support. results and tests are free.
    """
    tree, name = tree_of(source), file.removesuffix(".py")
    folder = file.rpartition("/")[0]
    if folder in ("results", "tests"):
        return set()
    if folder == "support":
        return packages(tree) - TORCH - CONCEPTS - {"support", "matplotlib", "numpy"}
    if name == "train":
        return packages(tree) - TORCH - CONCEPTS - {"support"}
    if name not in CONCEPTS:
        raise ValueError(f"{file} has no place in the house; tests/test_house.py knows its rooms")
    found = set()
    for node in tree.body:
        is_demo = isinstance(node, ast.FunctionDef) and DEMO.fullmatch(node.name)
        allowed = TORCH | CONCEPTS | {"matplotlib"} if is_demo else TORCH
        found |= packages(node) - allowed
    return found


def test_arrows_go_down_only():
    found = {file: forbidden_imports(file, source_of(file)) for file in FILES}
    assert not {file: names for file, names in found.items() if names}


@pytest.mark.parametrize("file, more, found", [
    ("ntk.py", "import numpy", "numpy"),
    ("ntk.py", "if True:\n    from sga import decompose", "sga"),
    ("ntk.py", "def f():\n    import dit", "dit"),
    ("ntk.py", "class A:\n    import numpy.linalg", "numpy"),
    ("ntk.py", "class A:\n    def main(self):\n        import matplotlib", "matplotlib"),
    ("ntk.py", "import matplotlib.pyplot as plt", "matplotlib"),
    ("ntk.py", "def main():\n    import train", "train"),
    ("ntk.py", "def measure_all():\n    from support import book", "support"),
    ("ntk.py", "def paint_all():\n    import results.cover", "results"),
    ("support/book.py", "def f():\n    import train", "train"),
    ("support/book.py", "from results import study", "results"),
    ("train.py", "import matplotlib", "matplotlib"),
    ("train.py", "from results import study", "results"),
])
def test_an_arrow_that_goes_up_is_noticed(file, more, found):
    assert forbidden_imports(file, more) == {found}


def test_what_a_demo_may_import_is_allowed():
    for name in ("main", "measure_meeting", "paint_reader"):
        demo = f"def {name}():\n    import matplotlib, dit\n    from ntk import cosines\n"
        assert forbidden_imports("sga.py", demo) == set()
    assert forbidden_imports("results/study.py", "import train, results") == set()


def test_a_file_without_a_place_in_the_house_is_noticed():
    with pytest.raises(ValueError, match="helpers.py has no place"):
        forbidden_imports("helpers.py", "")


def program():
    """{module: what it imports}, of train and of the modules of support."""
    names = {"train": "train.py"}
    for file in FILES:
        if file.startswith("support/"):
            names[file.removesuffix(".py").replace("/", ".")] = file
    return {name: imported(tree_of(source_of(file)), "support") for name, file in names.items()}


def test_no_module_of_the_program_imports_itself_by_way_of_others():
    graph = program()
    assert list(graphlib.TopologicalSorter(graph).static_order())
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(graph | {"ntk": {"train"}, "sga": {"ntk"}}).prepare()


def test_the_program_uses_every_concept():
    assert CONCEPTS <= set().union(*program().values())
