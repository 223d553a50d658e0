"""What the pages say exists and is true: code runs, equations are those of the code and the tests,
links, figures and commands lead somewhere.

    python tests/test_readme.py

mends the line numbers of the pages' links to functions.
"""

import ast
import contextlib
import functools
import io
import json
import re
import shlex
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import exercises  # noqa: E402
import ntk  # noqa: E402
import train  # noqa: E402
from support import book, report  # noqa: E402

EQUATIONS = range(1, 24)                       # the first one and, not included, the last
MOST_WORDS = 3000
SECONDS = 60                                   # that a block of code may take


@functools.cache
def read(file):
    return (ROOT / file).read_text(encoding="utf-8")


README = read("README.md")
PAGES = {"README.md": README}
for page in sorted((ROOT / "results").glob("*.md")):
    PAGES[f"results/{page.name}"] = page.read_text(encoding="utf-8")


def of_every_page(pattern):
    """The pairs (page, what the pattern finds in it), without repetitions."""
    pairs = set()
    for page, text in PAGES.items():
        pairs |= {(page, found) for found in re.findall(pattern, text)}
    return sorted(pairs)


# --- The page itself ------------------------------------------------------------------------------

def test_the_readme_is_short():
    assert len(README.split()) <= MOST_WORDS


def test_the_pages_are_plain_text_without_markers():
    """What a reader of the source sees is what the page says."""
    marker = r"<!--|\{\{|\{%|@@"
    assert not of_every_page(marker)
    assert re.search(marker, 'an error of <!-- = mean("dit") -->0.18')


# --- Commands -------------------------------------------------------------------------------------

def test_the_two_commands_stand_alone_on_a_line():
    lines = README.splitlines()
    assert "pip install -r requirements.txt && python train.py" in lines
    assert "pip install -r requirements.txt && python -m pytest" in lines


def test_every_program_that_a_page_runs_exists():
    programs = of_every_page(r"python ([\w/]+\.py)")
    assert len(programs) > 5
    assert not [pair for pair in programs if not (ROOT / pair[1]).exists()]


def blocks(language, page=README):
    """A page's blocks of one language, "" for those that name none."""
    # Every second part between fences is a block, and begins with the name of its language.
    parts = re.split(r"^```", page, flags=re.M)[1::2]
    heads_and_codes = [part.split("\n", 1) for part in parts]
    return [code for head, code in heads_and_codes if head.strip() == language]


def training_commands():
    """The arguments of train.py in the README's blocks of commands."""
    commands = []
    for line in "".join(blocks("") + blocks("sh")).splitlines():
        for command in line.split("&&"):
            words = shlex.split(command, comments=True)
            if "train.py" in words:
                commands.append(words[words.index("train.py") + 1:])
    return commands


@pytest.mark.parametrize("arguments", training_commands())
def test_train_understands_every_command_of_the_readme(arguments):
    if arguments[:1] == ["sample"]:
        book.parse_sample(arguments[1:])
    else:
        book.parse(arguments, train.Settings, train.PRESETS, "")


def test_a_command_that_train_does_not_know_is_noticed():
    assert len(training_commands()) > 1
    with pytest.raises(SystemExit, match="--learning_speed"):
        book.parse(["--learning_speed", "3"], train.Settings, train.PRESETS, "")


# --- Code -----------------------------------------------------------------------------------------

BLOCKS = blocks("python") + blocks("python", PAGES["results/details.md"])
WITH_A_DIFFERENCE = [code for code in BLOCKS if "relative difference" in code]


@contextlib.contextmanager
def time_limit(seconds):
    """Within, more than so many seconds raise TimeoutError, where the system has such alarms."""
    def ring(*_):
        raise TimeoutError(f"a block of the README takes more than {seconds} seconds")

    if not hasattr(signal, "SIGALRM"):
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def printed_by(code):
    """What a block prints when it runs alone."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, time_limit(SECONDS):
        exec(code, {"__name__": "block"})
    return printed.getvalue()


def relative_difference(printed):
    return float(re.search(r"relative difference (\S+)", printed)[1])


@pytest.mark.parametrize("code", BLOCKS)
def test_every_block_of_code_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = printed_by(code)
    if "relative difference" in code:
        assert relative_difference(printed) < 1e-14


@pytest.mark.parametrize("code", WITH_A_DIFFERENCE)
def test_a_block_shows_a_difference_where_there_is_one(code, monkeypatch):
    """The twin: with an interaction matrix that is wrong by a thousandth."""
    def wrong(matrix):
        def wrong_matrix(*arguments, **options):
            return 1.001 * matrix(*arguments, **options)
        return wrong_matrix

    for name in ("interaction_matrix", "fast_interaction_matrix"):
        monkeypatch.setattr(ntk, name, wrong(getattr(ntk, name)))
    assert relative_difference(printed_by(code)) > 1e-4


def test_one_block_shows_a_relative_difference_and_a_block_that_hangs_is_stopped():
    assert WITH_A_DIFFERENCE
    if hasattr(signal, "SIGALRM"):
        with pytest.raises(TimeoutError), time_limit(0.05):
            while True:
                pass


# --- Equations ------------------------------------------------------------------------------------

def equations(text):
    """The numbers n of "Eq. n", "Eq. n, m" and "Eq. n-m" in a text."""
    found = set()
    for numbers in re.findall(r"Eq\. (\d+(?:(?:-|, )\d+)*)", text):
        for part in numbers.split(", "):
            first, _, last = part.partition("-")
            found |= set(range(int(first), int(last or first) + 1))
    return found


def test_numbers_of_equations_are_read():
    text = "Eq. 3, and Eq. 7-9 (Eq. 10, 12) but not 5"
    assert equations(text) == {3, 7, 8, 9, 10, 12}


@functools.cache
def functions(file):
    """{name: (docstring, source)} of every function and class of a file, methods included."""
    lines, found = read(file).splitlines(), {}
    for node in ast.walk(ast.parse(read(file))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            source = "\n".join(lines[node.lineno - 1:node.end_lineno])
            found[node.name] = (ast.get_docstring(node) or "", source)
    return found


DOCUMENTED = ("flow_matching.py", "ntk.py", "sga.py", "support/report.py")
TESTED = ("tests/test_flow_matching.py", "tests/test_ntk.py", "tests/test_sga.py")

# The rows of the derivation: {number: (statement, why it matters, functions, tests)}.
ROW = re.compile(r"^\| (\d+) \| (.*?) \| ([^|]*) \| ([^|]*) \| ([^|]*) \|$", re.M)
ROWS = {int(number): row for number, *row in ROW.findall(README)}


def test_the_equations_of_the_readme_the_docstrings_and_the_tests_are_the_same():
    in_docstrings, in_tests = set(), set()
    for file in DOCUMENTED:
        for docstring, _ in functions(file).values():
            in_docstrings |= equations(docstring)
    for file in TESTED:
        in_tests |= equations(read(file))
    assert set(ROWS) == in_docstrings == in_tests == set(EQUATIONS)


def test_nobody_names_an_equation_that_is_not_in_the_derivation():
    files = [*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), *ROOT.glob("results/*.py")]
    texts = [file.read_text(encoding="utf-8") for file in files]
    named = set().union(*map(equations, [*texts, *PAGES.values()]))
    assert named <= set(EQUATIONS)
    assert not equations("Eq. 99") <= set(EQUATIONS)


@pytest.mark.parametrize("number", EQUATIONS)
def test_every_equation_names_its_functions_and_its_tests(number):
    _, why, named, tests = ROWS[number]
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L\d+\)", named)
    judges = re.findall(r"`(\w+)`", tests)
    assert links and judges and len(why) > 10
    for name, file in links:
        docstring, _ = functions(file)[name]
        assert number in equations(docstring), f"the docstring of {name} does not name Eq. {number}"
    tested = {}
    for file in TESTED:
        tested |= functions(file)
    for judge in judges:
        _, source = tested[judge]
        assert number in equations(source), f"{judge} does not name Eq. {number}"


def test_every_test_that_the_page_names_exists():
    known = set()
    for file in (ROOT / "tests").glob("*.py"):
        known |= set(functions(f"tests/{file.name}"))
    named = set(re.findall(r"`(test_\w+)`", README))
    assert named and not named - known


# --- Links ----------------------------------------------------------------------------------------

def line_of(name, file):
    """The number of the line where a file defines a name. Raises ValueError where it does not."""
    definition = re.compile(rf"\s*(?:def|class) {name}\b|{name}\b[^=]* = ")
    for number, line in enumerate(read(file).splitlines(), 1):
        if definition.match(line):
            return number
    raise ValueError(f"{file} does not define {name}")


LINK = re.compile(r"\[`(\w+)`\]\(((?:\.\./)?[\w/]+\.py)(#L\d+)?\)")


def relinked(text):
    """The text with every link [`name`](file.py#Lnn) on the line that defines the name.

    A link without a line stays as it is. Raises ValueError if a file does not define its name.
    """
    def link(match):
        name, file, line = match.groups()
        now = f"#L{line_of(name, file.removeprefix('../'))}"
        return f"[`{name}`]({file}{now if line else ''})"
    return LINK.sub(link, text)


def test_links_to_functions_are_on_their_line():
    for text in PAGES.values():
        assert relinked(text) == text, "python tests/test_readme.py mends the line numbers"
        # No other form of link names a line, so that none is overlooked.
        assert text.count(".py#L") == len([line for _, _, line in LINK.findall(text) if line])
    assert README.count(".py#L") > 25
    assert relinked("[`path`](flow_matching.py#L99999)") in README
    with pytest.raises(ValueError, match="ntk.py does not define nothing_such"):
        relinked("[`nothing_such`](ntk.py#L1)")


def anchors(text):
    """What a link may name behind #: the titles of a page as GitHub writes them."""
    titles = re.findall(r"^#+ (.*)", text, re.M)
    return [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


def leads_somewhere(page, target):
    """Whether a link of a page has its file and, in a page, its title. Other sites are trusted."""
    file, _, place = target.partition("#")
    if file.startswith("https://"):
        return True
    path = (ROOT / page).parent / file if file else ROOT / page
    if place and path.suffix == ".md":
        return path.exists() and place in anchors(path.read_text(encoding="utf-8"))
    return path.exists()


def test_every_link_leads_somewhere():
    links = of_every_page(r"\]\(([^)\s]+)\)")
    assert len(links) > 30
    assert not [link for link in links if not leads_somewhere(*link)]
    assert not leads_somewhere("README.md", "#no-such-title")
    assert not leads_somewhere("README.md", "results/nothing.png")


def test_the_differences_from_the_paper_are_linked_to_the_code():
    part = PAGES["results/details.md"].split("## Differs from")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("| ")]
    rows = [line for line in lines if "the paper says |" not in line]
    assert len(rows) >= 6 and all(LINK.search(row) for row in rows)


# --- Figures: each names its command, and a test runs that command, small -------------------------

RUN_BY = {"toy_data.py": ("test_alone.py", "demos"),
          "results/figures.py": ("test_figures.py", "drawn"),
          "results/first_minutes.py": ("test_first_minutes.py", "printed"),
          "train.py": ("test_train.py", "finished"),
          "results/study.py": ("test_study.py", "test_the_figures_are_drawn_from_the_rows"),
          "results/regimes.py": ("test_regimes.py", "tiny_study"),
          "results/step_noise.py": ("test_regimes.py",
                                   "test_the_square_of_drawn_steps_is_the_predicted_one"),
          "results/regimes_report.py": (
              "test_regimes_report.py",
              "test_the_figures_are_drawn_from_whatever_rows_there_are"),
          "results/ranks.py": ("test_regimes.py", "test_the_ranks_are_drawn_from_the_rows"),
          "results/cover.py": ("test_train.py", "test_the_cover_is_drawn")}


@pytest.mark.parametrize("page, figure", of_every_page(r"!\[[^\]]*\]\(([^)]+)\)"))
def test_every_figure_exists_and_names_a_command_that_a_test_runs(page, figure):
    assert (ROOT / page).parent.joinpath(figure).stat().st_size > 10_000
    if page == "README.md":
        caption = README.split(f"]({figure})\n\n*")[1].split("*\n")[0]
    else:
        caption = PAGES[page].split("## How it was measured")[1].split("\n## ")[0]
        assert f"`{figure}`" in caption
    if "/figures/" in figure:
        caption = "`python results/figures.py` draws all such pictures"
        assert caption in README
    commands = re.findall(r"python (\S+\.py)", caption)
    assert commands
    for command in commands:
        file, name = RUN_BY[command]
        assert name in functions(f"tests/{file}")


def test_the_readme_shows_every_picture_of_the_derivation():
    shown = set(re.findall(r"\]\(results/figures/(\w+)\.png\)", README))
    assert shown == {file.stem for file in (ROOT / "results/figures").glob("*.png")}


def test_the_readme_knows_how_much_of_the_loss_is_its_floor():
    rows = json.loads(read("results/runs/dit-0.json"))["rows"]
    shares = [row["floor"] / row["loss"] for row in rows]
    assert f"{min(shares):.0%} to {max(shares):.0%} of the default DiT's loss" in README
    assert len(shares) == 12


# --- What the pages explain -----------------------------------------------------------------------
# The columns of the log, the arms and the table of the default run: see test_study.py.

def test_every_field_of_the_probe_is_explained():
    run = train.Run(train.Settings(**train.PRESETS["tiny", "dit"] | {"probe": 1}))
    report.Recorder(run)
    fields = run.probe[0].keys()
    assert {"M", "offsets"} < fields
    explained = PAGES["results/details.md"].split("`probe.jsonl`")[1]
    assert not [field for field in fields if f"`{field}`" not in explained]


def test_the_readme_knows_how_many_exercises_there_are():
    numbers = {13: "thirteen", 14: "fourteen", 15: "fifteen", 16: "sixteen", 21: "twenty-one"}
    number = len(exercises.EXERCISES)
    assert f"{numbers.get(number, number)} exercises" in README.lower()
    assert "python tests/exercises.py" in README


def test_the_benchmarks_table_is_whole():
    table = [line for line in read("results/ntk_bench_cpu.md").splitlines() if line.startswith("|")]
    assert len(table) == 2 + 3 * 6


if __name__ == "__main__":
    for page, text in PAGES.items():
        (ROOT / page).write_text(relinked(text), encoding="utf-8")
