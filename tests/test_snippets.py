"""What a reader lifts out runs on data of one's own: the examples of the docstrings, the shapes and
labels that a caller may bring, and the debugger's commands of the README.

An example begins with a line "Example...:", and is the indented code below it, of at most five
lines. A comment `# (3, 2)` behind it states the shapes of what the line assigns.
"""

import ast
import contextlib
import functools
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import dit
import flow_matching as fm
import ntk
import sga
import unet

ROOT = Path(__file__).parent.parent
MODULES = {"flow_matching": "fm", "ntk": "ntk", "sga": "sga", "dit": "dit", "unet": "unet"}
MOST_LINES = 5


# --- The examples of the docstrings ---------------------------------------------------------------

EXAMPLE = re.compile(r"^Example\b[^\n]*(?:\n[^\n ][^\n]*)*:\n((?: {4}.*\n?)+)", re.M)


def examples_in(docstring):
    """The code of each example of a docstring."""
    return [textwrap.dedent(code) for code in EXAMPLE.findall(docstring)]


@functools.cache
def source_of(module):
    return (ROOT / f"{module}.py").read_text(encoding="utf-8")


def examples_of(source):
    """[(name, code)] of a module's functions and classes."""
    found = []
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            docstring = ast.get_docstring(node) or ""
            found += [(node.name, code) for code in examples_in(docstring)]
    return found


EXAMPLES = []
for one in MODULES:
    EXAMPLES += [(one, name, code) for name, code in examples_of(source_of(one))]


def names_at_the_start(module):
    """What the examples of a module say they begin with."""
    begin = re.search(r"`(import torch, .*?)`", source_of(module))[1]
    names = {"__name__": "example"}
    exec(begin, names)
    return names


def run(code, names):
    """Runs an example. Raises AssertionError for a shape that is not as its comment says."""
    assert len(code.splitlines()) <= MOST_LINES, "an example has five lines at most"
    with contextlib.redirect_stdout(io.StringIO()):
        for statement in ast.parse(code).body:
            exec(compile(ast.Module([statement], []), "example", "exec"), names)
            line = code.splitlines()[statement.end_lineno - 1]
            _, _, comment = line.partition("  # ")
            if isinstance(statement, ast.Assign) and comment:
                check_shapes(statement.targets[0], comment, names)


def check_shapes(target, comment, names):
    """Whether the names that are assigned have the shapes of a comment: "(3, 2), (3,)"."""
    targets = target.elts if isinstance(target, ast.Tuple) else [target]
    found = [str(tuple(names[one.id].shape)) for one in targets]
    assert ", ".join(found) == comment


@pytest.mark.parametrize("module, name, code", EXAMPLES)
def test_every_example_runs_and_has_the_shapes_that_it_states(module, name, code):
    torch.manual_seed(0)
    run(code, names_at_the_start(module))


@pytest.mark.parametrize("sabotaged, error", [
    (("# (7, 2)", "# (7, 3)"), AssertionError),
    (("0.5, points", "0.0, points"), ValueError),
    (("torch.randn(7, 2)", "torch.randn(7, 3)"), ValueError),
    (("points = torch.randn(5, 2)", "points = 1\n" * MOST_LINES), AssertionError),
])
def test_an_example_that_is_wrong_is_noticed(sabotaged, error):
    code, = examples_in(fm.exact_velocity.__doc__.replace("\n    ", "\n"))
    run(code, names_at_the_start("flow_matching"))
    with pytest.raises(error):
        run(code.replace(*sabotaged), names_at_the_start("flow_matching"))


# The whole method stands in the README, with a network and images; euler is called like heun, and
# path, target and residual are the parts of the loss.
SHOWN_ELSEWHERE = {"one_sga_step", "euler", "path", "target", "residual"}
PARTS_OF_A_NETWORK = {"with_defaults", "sinusoid", "attend", "patchify", "unpatchify", "norm",
                      "zero", "larger"}
DEMO = re.compile(r"_.*|main|measure_.*|paint_.*|two_points")


def functions_without_an_example(source, alias):
    """The public functions of a module that no example of it calls."""
    defined = [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    public = {name for name in defined if not DEMO.fullmatch(name)}
    examples = "\n".join(code for _, code in examples_of(source))
    return public - set(re.findall(rf"\b{alias}\.(\w+)\(", examples))


def test_every_public_function_is_called_in_an_example():
    missing = set()
    for module, alias in MODULES.items():
        missing |= functions_without_an_example(source_of(module), alias)
    assert missing - PARTS_OF_A_NETWORK == SHOWN_ELSEWHERE
    without = source_of("ntk").replace("ntk.ntk_trace(", "something_else(")
    assert functions_without_an_example(without, "ntk") == {"ntk_trace"}        # twin


# --- The exact velocity alone ---------------------------------------------------------------------

def population():
    """x (4, 2), and points (3, 2)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 2, generator=generator, dtype=torch.float64)
    return x, torch.randn(3, 2, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("t", [0.5, torch.tensor(0.5), torch.full((4,), 0.5),
                               torch.full((4, 1), 0.5)])
def test_the_exact_velocity_takes_one_time_or_one_for_each_sample(t):
    """Eq. 4 is written out for one number at a time."""
    x, points = population()
    found = fm.exact_velocity(x, t, points)
    for one, u in zip(x, found):
        density = [torch.exp(-(one - 0.5 * point).square().sum() / 0.5) for point in points]
        mean = sum(p * point for p, point in zip(density, points)) / sum(density)
        assert torch.allclose(u, (one - mean) / 0.5, rtol=1e-12, atol=0)
        assert not torch.allclose(u, (one - mean) / 0.4, rtol=1e-12, atol=0)    # twin


@pytest.mark.parametrize("t", [0, 0.0, 1.5, -0.5, torch.nan, torch.full((3,), 0.5),
                               torch.full((1,), 0.5), torch.full((1, 4), 0.5),
                               torch.full((4, 2), 0.5), torch.zeros(4)])
def test_the_exact_velocity_refuses_other_times(t):
    x, points = population()
    with pytest.raises(ValueError, match="0 < t <= 1|t must be one number, or one for each of the"):
        fm.exact_velocity(x, t, points)


@pytest.mark.parametrize("points", [torch.randn(2, 2), torch.randn(3, 2)])
def test_one_sample_without_its_batch_is_refused(points):
    """With two points of two numbers, x (2,) would look like two samples of one number each."""
    x = torch.randn(2)
    with pytest.raises(ValueError, match=r"one sample alone is x\[None\]"):
        fm.exact_velocity(x, 0.5, points)
    assert fm.exact_velocity(x[None], 0.5, points).shape == (1, 2)


# --- Tuples and labels ----------------------------------------------------------------------------

class Pictures(torch.utils.data.Dataset):
    """A data set as users write it, with a list and a dict."""

    root = [4, 4, 9, 9, 9]

    def __len__(self):
        return len(self.root)

    def __getitem__(self, index):
        return {"image": torch.full((1, 4, 4), float(index)), "root": self.root[index]}


def test_root_tuples_are_the_batches_of_a_data_set_of_ones_own():
    pictures = Pictures()
    tuples = sga.root_tuples(pictures.root, torch.Generator().manual_seed(0))
    batches = list(DataLoader(pictures, batch_sampler=tuples))
    assert sorted(len(batch["image"]) for batch in batches) == [2, 3]
    assert all(len(batch["root"].unique()) == 1 for batch in batches)
    shuffled = list(DataLoader(pictures, batch_size=3))
    assert any(len(batch["root"].unique()) > 1 for batch in shuffled)           # twin


@pytest.mark.parametrize("root", [["cat", "dog"], [[0], [1, 2]]])
def test_roots_that_are_no_numbers_are_refused(root):
    with pytest.raises(ValueError, match="root must be whole numbers"):
        sga.root_tuples(root, torch.Generator())


def test_labels_of_ones_own_have_offsets_of_their_own():
    """With the deviation 0 every t is the sigmoid of its offset: Eq. 19."""
    labels, offsets = torch.tensor([7, 3, 3, 40]), {3: 1.0, 7: -2.0, 40: 0.0}
    t = sga.offset_time(labels, torch.Generator(), offsets, std=0.0)
    assert torch.allclose(torch.logit(t), torch.tensor([-2.0, 1.0, 1.0, 0.0]), atol=1e-6)
    # A dict and a sequence mean the same.
    same = sga.offset_time([0, 1, 1], torch.Generator(), [-2.0, 1.0], std=0.0)
    assert torch.equal(same, t[:3])
    assert not torch.equal(t, sga.offset_time(labels, torch.Generator(), offsets))      # twin


def test_labels_of_ones_own_have_weights_of_their_own():
    """Eq. 20 at t = 1/3, where SNR = 4."""
    t = 1 / 3
    weight = sga.min_snr_weight(t, [7, 3, 40], {3: 1.0, 7: 2.0, 40: 9.0})
    assert torch.allclose(weight, torch.tensor([1 / 2, 1 / 4, 1.0]), atol=1e-6)
    named = sga.min_snr_weight(t, [0, 1], (2.0, 1.0))
    assert torch.equal(named, weight[:2])
    assert not torch.equal(named, sga.min_snr_weight(t, [0, 1]))                # twin


@pytest.mark.parametrize("labels, values, words", [
    ([3, 8], {3: 0.5, 7: 1.0}, "one of 3, 7, not 8"),
    ([0, 2], (0.5, 1.0), "one of 0..1, not 2"),
    ([0, -1], (0.5, 1.0), "one of 0..1, not -1"),
    ([0.0, 0.5], (0.5, 1.0), "one of 0..1, not 0.5"),
    (["macro"], {"macro": 0.5}, "must be whole numbers"),
    ([0], {"macro": 0.5}, "must be whole numbers, not 'macro'"),
    ([[0], [1]], (0.5, 1.0), r"must be \(n,\)")])
def test_a_label_without_a_value_is_refused(labels, values, words):
    with pytest.raises(ValueError, match=words):
        sga.offset_time(labels, torch.Generator(), values)
    with pytest.raises(ValueError, match=words):
        sga.min_snr_weight(0.3, labels, values)


# --- Networks without captions --------------------------------------------------------------------

def small(name, channels):
    """A small network of one's own, away from its zero start."""
    torch.manual_seed(0)
    if name == "dit":
        network = dit.DiT(11, 8, 4, 16, 1, 2, channels=channels)
    else:
        network = unet.UNet(11, 8, (8, 8, 8), 8, 2, channels=channels)
    for weight in network.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.2)
    return network.double()


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", ["dit", "unet"])
def test_every_step_goes_with_classes_and_without_a_condition(name, channels):
    """Loss, samples and M, for images of one channel and for latents of four."""
    network = small(name, channels)
    x0, e = torch.randn(2, 3, channels, 8, 8, dtype=torch.float64)
    t = torch.linspace(0.2, 0.8, 3, dtype=torch.float64)
    classes, null = torch.tensor([[1], [5], [10]]), torch.zeros(3, 1, dtype=torch.long)
    r = {}
    for condition in (None, null, classes):
        residual = fm.residual(network, x0, e, t, condition).detach()
        images = fm.sample(network, condition, e, steps=2)
        inputs = (fm.path(x0, e, t), t)
        if condition is not None:
            inputs = (*inputs, condition)
        M = ntk.fast_interaction_matrix(network, inputs, residual)
        by_gradients = ntk.interaction_matrix(*ntk.of_module(network), inputs, residual)
        assert torch.allclose(M, by_gradients, rtol=1e-9)
        r[condition] = residual, images, M
    for found, same, other in zip(r[None], r[null], r[classes]):
        assert torch.equal(found, same)
        assert not torch.allclose(found, other)                                 # twin


@pytest.mark.parametrize("name", ["dit", "unet"])
def test_guidance_takes_classes_and_refuses_no_condition(name):
    network = small(name, 1)
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    classes = torch.tensor([[3], [4]])
    v, v_null = network(x, 0.5, classes), network(x, 0.5)
    guided = fm.guided(network, classes, 3.0)(x, 0.5)
    assert torch.allclose(guided, v_null + 3 * (v - v_null))
    assert not torch.allclose(guided, v)                                        # twin
    with pytest.raises(ValueError, match="without tokens there is no guidance"):
        fm.guided(network, None, 3.0)
    with pytest.raises(ValueError, match=r"class labels \(2, 1\), not \(2,\)"):
        network(x, 0.5, classes[:, 0])


# --- Stepping through -----------------------------------------------------------------------------

def stepping():
    """The command that starts the debugger, as words, and the lines that one types then."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    section = page.split("## Stepping through\n")[1].split("\n## ")[0]
    _, command, below = section.split("```\n")
    typed = []
    for item in re.findall(r"^- (.*?): ", below, re.M):
        typed += re.findall(r"`([^`]*)`", item)
    return shlex.split(command), typed


def debug(words, typed, folder):
    """What the debugger says before the first line is typed, and {line: its answer}.

    It runs in a process of its own, as it does for a reader.
    """
    python, *words = [str(folder) if word == "runs/steps" else word for word in words]
    assert python == "python"
    lines = "\n".join([*typed, "q", ""])
    stopped = subprocess.run([sys.executable, *words], input=lines, capture_output=True, text=True,
                             cwd=ROOT, timeout=300, encoding="utf-8",
                             env=os.environ | {"PYTHONIOENCODING": "utf-8"})
    first, *answers = stopped.stdout.split("(Pdb) ")
    return first, dict(zip(typed, answers))


def tensors_in(answer):
    """The numbers of every tensor that is printed, in a list of its own."""
    found = []
    for inside in re.findall(r"tensor\(([\[\]\d\s,.e+-]*)", answer):
        numbers = re.findall(r"-?\d[\d.]*(?:e[+-]\d+)?", inside)
        found.append([float(number) for number in numbers])
    return found


def test_the_tensors_of_an_answer_are_read():
    answer = "(tensor([[1.5, -2e-03],\n   [3., 4]]), tensor([7], dtype=torch.int64))"
    assert tensors_in(answer) == [[1.5, -0.002, 3, 4], [7]]
    assert tensors_in("*** NameError: name 't' is not defined") == []


def test_the_debugger_stops_where_the_readme_says_and_shows_what_it_says(tmp_path):
    words, typed = stepping()
    see_batch, stop_at_shares, _, see_share, stop_at_M, _, see_M = typed
    # What the page does not show: how many samples there are, and the sum that it speaks of.
    see_sum = "p len(rows.v), sum(share.products for share in shares)"
    typed.insert(typed.index(see_share), see_sum)
    no_stop = "tbreak ntk.nothing_such"
    first, answers = debug(words, [*typed, "u", no_stop], tmp_path / "run")

    assert "pretrain step 8/12" in first and "finetune" not in first
    assert "draw_batch()->" in first
    granularity, t, a = tensors_in(answers[see_batch])
    assert granularity == [0, 1, 2, 0, 1, 2]   # two root tuples
    assert len(t) == 6 and 0 < min(t) and max(t) < 1
    assert a == pytest.approx([1 / 6] * 6, abs=1e-4)

    assert "Breakpoint 2 at" in answers[stop_at_shares]
    assert answers[see_share].startswith("('head', tensor(")
    assert answers[see_sum].startswith("(18, tensor(")            # 2 roots, 3 views, 3 noise levels
    assert "Breakpoint 3 at" in answers[stop_at_M]
    (share,), (whole,), (M,) = [tensors_in(answers[see]) for see in (see_share, see_sum, see_M)]
    assert len(share) == len(M) == 18 * 18
    assert M == whole
    # Twins: one share is not the whole, and a function that is not there stops nobody.
    assert M != share
    assert "Breakpoint" not in answers[no_stop]
    assert "probe_row()" in answers["u"]
    assert "finetune" not in "".join(answers.values())            # the row is not yet written
