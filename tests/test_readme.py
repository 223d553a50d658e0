"""What the README says exists, and its table is that of the committed runs."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

import flow_matching
import ntk
import sga

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_two_commands_stand_alone_on_a_line():
    lines = README.splitlines()
    assert "pip install -r requirements.txt && python train.py" in lines
    assert "pip install -r requirements.txt && python -m pytest" in lines


def test_the_results_are_those_of_the_committed_runs():
    spec = importlib.util.spec_from_file_location("tabulate", ROOT / "results/tabulate.py")
    tabulate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tabulate)
    assert len(tabulate.table()) == 2 + 2 * 8                              # both networks, eight rows each
    assert "\n".join(tabulate.table()) in README


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_every_linked_file_exists(target):
    assert target.startswith("https://") or (ROOT / target).exists()


def test_every_equation_names_a_function_and_a_test_that_exist():
    rows = re.findall(r"^\| (\d+) \|.*\| ([^|]*) \| ([^|]*) \|$", README, re.M)
    assert [int(number) for number, *_ in rows] == list(range(1, 22))
    tests = "".join((ROOT / "tests" / name).read_text() for name in ("test_flow_matching.py", "test_ntk.py", "test_sga.py"))
    for number, functions, names in rows:
        module = flow_matching if int(number) <= 9 else ntk if int(number) <= 17 else sga
        for function in re.findall(r"`(\w+)`", functions):
            documented = getattr(module, function).__doc__
            assert documented
        for name in re.findall(r"`(\w+)`", names):
            assert f"def {name}(" in tests
        numbers = {int(k) for first, last in re.findall(r"Eq\. (\d+)(?:[-,] ?(\d+))?", Path(module.__file__).read_text())
                   for k in range(int(first), int(last or first) + 1)}
        assert int(number) in numbers, f"no docstring of {module.__name__} names Eq. {number}"


def test_every_column_of_the_log_is_explained():
    import train
    explained = README.split("one row every `--every` steps:")[1]
    for column in train.COLUMNS:
        assert f"`{column}`" in explained or column.rsplit("_", 1)[0] in explained, column


def test_every_arm_and_every_field_of_the_probe_is_explained():
    import train
    for word in (*train.ARMS, "step", "M", "trace", "cross", "conflict", "pairs", "sign_agreement", "drift", "kernel"):
        assert f"`{word}`" in README, word


def test_the_benchmarks_table_is_the_committed_one():
    table = [line for line in (ROOT / "results/ntk_bench_cpu.md").read_text().splitlines() if line.startswith("|")]
    assert len(table) == 2 + 3 * 4 and "\n".join(table) in README


@pytest.mark.parametrize("module", ["toy_data", "flow_matching", "ntk", "sga", "dit", "unet"])
def test_concept_modules_import_nothing_but_torch(module):
    top = re.findall(r"^(?:import|from) (\w+)", (ROOT / f"{module}.py").read_text(), re.M)
    assert set(top) <= {"torch", "torchvision"} | sys.stdlib_module_names
