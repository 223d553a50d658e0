"""What the README says exists and is true: its code runs, its equations are those of the code and the tests, its links, figures and tables fit.

`python tests/test_readme.py` mends the line numbers of its links to functions.
"""

import ast
import contextlib
import importlib.util
import io
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
README = (ROOT / "README.md").read_text()
PAGES = {"README.md": README, "results/README.md": (ROOT / "results/README.md").read_text()}
OF = {n: "flow_matching" if n <= 9 else "ntk" if n <= 17 else "sga" for n in range(1, 22)}     # each equation's module
ROWS = {int(row[0]): row[1:] for row in re.findall(r"^\| (\d+) \| (.*?) \| ([^|]*) \| ([^|]*) \| ([^|]*) \|$", README, re.M)}   # Eq.: ..., functions, tests


# --- code ---

def test_the_two_commands_stand_alone_on_a_line():
    lines = README.splitlines()
    assert "pip install -r requirements.txt && python train.py" in lines
    assert "pip install -r requirements.txt && python -m pytest" in lines


def python_blocks():
    return re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)


@pytest.mark.parametrize("block", python_blocks())
def test_the_code_runs_and_shows_what_it_promises(block):
    def run(code):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, {})
        return printed.getvalue()
    gap = lambda printed: float(re.search(r"relative difference (\S+)", printed)[1])
    assert len(block.splitlines()) <= 20 and gap(run(block)) < 1e-14
    twin = block.replace("fast_interaction_matrix(model, inputs, r)", "fast_interaction_matrix(model, inputs, 1.001 * r)")
    assert gap(run(twin)) > 1e-4


# --- equations ---

def equations(text):
    """The numbers n of "Eq. n", "Eq. n, m" and "Eq. n-m" in a text."""
    found = set()
    for numbers in re.findall(r"Eq\. (\d+(?:(?:-|, )\d+)*)", text):
        for part in numbers.split(", "):
            first, _, last = part.partition("-")
            found |= set(range(int(first), int(last or first) + 1))
    return found


def functions(file):
    """{name: its source} of every function of a file, methods included."""
    source = (ROOT / file).read_text()
    return {node.name: ast.get_source_segment(source, node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}


def docstrings(file):
    tree = ast.parse((ROOT / file).read_text())
    return {node.name: ast.get_docstring(node) or "" for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_numbers_of_equations_are_read():
    assert equations("Eq. 3, and Eq. 7-9 (Eq. 10, 12) but not 5") == {3, 7, 8, 9, 10, 12}


def test_the_equations_of_the_readme_the_docstrings_and_the_tests_are_the_same():
    modules = ("flow_matching", "ntk", "sga")
    in_docstrings = set().union(*(equations(text) for module in modules for text in docstrings(f"{module}.py").values()))
    in_tests = set().union(*(equations(text) for module in modules for text in functions(f"tests/test_{module}.py").values()))
    assert set(ROWS) == in_docstrings == in_tests == set(range(1, 22))


@pytest.mark.parametrize("number", range(1, 22))
def test_every_equation_names_its_functions_and_its_tests(number):
    _, why, named, tests = ROWS[number]
    documented, tested = docstrings(f"{OF[number]}.py"), functions(f"tests/test_{OF[number]}.py")
    names, judges = re.findall(r"\[`(\w+)`\]", named), re.findall(r"`(\w+)`", tests)
    assert names and judges and len(why) > 10
    for name in names:
        assert number in equations(documented[name]), f"the docstring of {name} does not name Eq. {number}"
    for judge in judges:
        assert number in equations(tested[judge]), f"{judge} does not name Eq. {number}"


# --- links ---

def relinked(text):
    """The text with every link [`name`](file.py#Lnn) on the line where the file defines the name. Raises StopIteration where it does not."""
    def line(match):
        name, file = match[1], match[2]
        lines = (ROOT / file).read_text().splitlines()
        number = next(k for k, code in enumerate(lines, 1) if re.match(rf"\s*(def|class) {name}\b", code))
        return f"[`{name}`]({file}#L{number})"
    return re.sub(r"\[`(\w+)`\]\((\w+\.py)#L\d+\)", line, text)


def test_links_to_functions_are_on_their_line():
    assert relinked(README) == README, "run python tests/test_readme.py to mend the line numbers"
    assert README.count(".py#L") > 30
    with pytest.raises(StopIteration):
        relinked("[`nothing_such`](ntk.py#L1)")


@pytest.mark.parametrize("page, target", sorted({(page, target) for page, text in PAGES.items() for target in re.findall(r"\]\(([^)]+)\)", text)}))
def test_every_link_leads_somewhere(page, target):
    file, _, place = target.partition("#")
    if file.startswith("https://"):
        return
    assert (ROOT / page).parent.joinpath(file).exists()
    if place and not place.startswith("L"):
        titles = re.findall(r"^#+ (.*)", README, re.M)
        assert place in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


def test_the_differences_from_the_paper_are_linked_to_their_lines():
    part = README.split("## Differs from")[1].split("\n## ")[0]
    rows = [row for row in part.splitlines() if row.startswith("| ") and not row.startswith("| the paper")]
    assert len(rows) >= 6 and all(".py#L" in row for row in rows)


def test_every_test_that_the_page_names_exists():
    known = set().union(*(functions(f"tests/{file.name}") for file in (ROOT / "tests").glob("*.py")))
    named = set(re.findall(r"`(test_\w+)`", README))
    assert len(named) > 20 and named <= known


# --- figures: each names its command, and some test runs that command, small ---

RUN_BY = {"toy_data.py": ("test_alone.py", "demos"), "flow_matching.py": ("test_alone.py", "demos"), "ntk.py": ("test_ntk.py", "test_demo_draws"),
          "sga.py": ("test_sga.py", "test_demo_draws"), "train.py": ("test_train.py", "finished"), "results/study.py": ("test_study.py", "test_the_figures_are_drawn_from_the_rows"),
          "results/cover.py": ("test_train.py", "test_the_cover_is_drawn")}


@pytest.mark.parametrize("page, figure", [(page, figure) for page, text in PAGES.items() for figure in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)])
def test_every_figure_exists_and_names_a_command_that_a_test_runs(page, figure):
    assert (ROOT / page).parent.joinpath(figure).stat().st_size > 10_000
    if page == "README.md":
        caption = README.split(f"]({figure})\n\n*")[1].split("*\n")[0]
        commands = re.findall(r"python (\S+\.py)", caption)
        assert commands
        for command in commands:
            file, name = RUN_BY[command]
            assert name in functions(f"tests/{file}")
    else:
        assert f"`{figure}`" in PAGES[page].split("## How it was measured")[1]


# --- tables and glossaries ---

def test_the_results_are_those_of_the_committed_runs():
    spec = importlib.util.spec_from_file_location("tabulate", ROOT / "results/tabulate.py")
    tabulate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tabulate)
    assert len(tabulate.table()) == 2 + 2 * 8                              # both networks, eight rows each
    assert "\n".join(tabulate.table()) in README


def test_every_column_of_the_log_is_explained():
    import train
    explained = README.split("one row every `--every` steps:")[1]
    for column in train.COLUMNS:
        assert f"`{column}`" in explained or column.rsplit("_", 1)[0] in explained, column


def test_every_arm_and_every_field_of_the_probe_and_the_study_is_explained():
    import json
    import train
    with open(ROOT / "results/study.jsonl") as stream:
        fields = json.loads(stream.readline())
    for word in (*train.ARMS, "step", "M", "offsets", "trace", "cross", "conflict", "pairs", "sign_agreement", "drift", "kernel", *fields):
        assert f"`{word}`" in README, word


def test_the_exercises_are_those_of_the_judge():
    import exercises
    told = README.split("## Exercises")[1].split("\n## ")[0]
    numbers = {n for group in re.findall(r"\(([\d, -]+)\)", told) for first, last in re.findall(r"(\d+)-?(\d*)", group) for n in range(int(first), int(last or first) + 1)}
    assert numbers == set(range(1, len(exercises.EXERCISES) + 1))
    for exercise in exercises.EXERCISES:
        if not exercise.change and not exercise.measure:
            assert ", ".join(f"`{name}`" for name in exercise.functions.split(", ")) in told


def test_the_benchmarks_table_is_whole():
    table = [line for line in (ROOT / "results/ntk_bench_cpu.md").read_text().splitlines() if line.startswith("|")]
    assert len(table) == 2 + 3 * 4


if __name__ == "__main__":
    (ROOT / "README.md").write_text(relinked(README))
