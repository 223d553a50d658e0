"""The comments that state a shape are true: the code runs, and what such a line assigns or returns
has the shape that it states.

Such a comment begins with the shape: `(N, P, C)`, `(N, L, C), (N, C)` for two targets,
`(n, k, 3) each` for all of them. A dimension is a number, a name, or a term of these: C/heads,
N - i, HW for H*W, 1 or N. `...` and *name stand for any others. The size of a name is that of the
variable of this name (a list's length), or the one that a call below gives. A `for` states what it
draws, and a class what its fields hold. The words after the shape are free.

How it is done: each module is read, a call of `note` is written behind every line that has such a
comment, and the module is run on small inputs. What was noted is compared with the comments.
"""

import ast
import contextlib
import functools
import io
import operator
import re
import sys
import tokenize
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import support
import train  # noqa: F401  first of all, so that what is not copied below has the plain modules

ROOT = Path(__file__).parent.parent

# In this order: a module finds the noting copies of those before it.
MODULES = ("toy_data", "flow_matching", "ntk", "sga", "dit", "unet", "support.report", "train")


def file_of(module):
    return ROOT / (module.replace(".", "/") + ".py")


SOURCES = {module: file_of(module).read_text(encoding="utf-8") for module in MODULES}


# --- Reading the comments -------------------------------------------------------------------------

def shape_comments(source):
    """{line: text} of the comments behind code that begin with a bracket, or hold a shape later."""
    lines, found = source.splitlines(), {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line, column = token.start
            text = token.string[1:].strip()
            behind_code = lines[line - 1][:column].strip()
            if behind_code and re.search(r"^\(|\((\d+|n|[A-Z]\d?|\.\.\.),", text):
                found[line] = text
    return found


SHAPES = re.compile(r"\([^()]*\)(?:, \([^()]*\))*")
DIMENSION = re.compile(r"\.\.\.|\*?\w+(?:(?: ?[-+*/] ?| or )\w+)*")
PRODUCT = re.compile(r"\b(?:\d+[A-Za-z]\w*|[A-Z]{2,}|[A-Z]?pp)\b")


def factors(letters):
    """HW to H*W, 3pp to 3*p*p, and 2C1 to 2*C1."""
    return "*".join(re.findall(r"^\d+|[A-Za-z]\d*", letters[0]))


@functools.cache
def read(text):
    """(the shapes that a comment begins with, whether each target has them), or None.

    A shape is a list of dimensions. It is None for a comment of another form.
    """
    form = SHAPES.match(text)
    if not form:
        return None
    shapes = []
    for shape in form[0][1:-1].split("), ("):
        dimensions = [part.strip() for part in shape.removesuffix(",").split(",") if part.strip()]
        if not all(DIMENSION.fullmatch(dimension) for dimension in dimensions):
            return None
        shapes.append([PRODUCT.sub(factors, dimension) for dimension in dimensions])
    return shapes, re.match(r" each\b", text[form.end():]) is not None


def is_open(dimension):
    """Whether a dimension stands for any number of others: `...` or *name."""
    return dimension[0] in ".*"


def names_in(dimension):
    return set() if is_open(dimension) else set(re.findall(r"[A-Za-z]\w*", dimension)) - {"or"}


def all_names(text):
    """The names in the shapes of a comment."""
    shapes, _ = read(text) or ([], False)
    return {name for shape in shapes for dimension in shape for name in names_in(dimension)}


# --- Writing the notes ----------------------------------------------------------------------------

class Noting(ast.NodeTransformer):
    """Writes a call of note behind each statement that has a shape comment.

    `x = f()  # (N, C)` in line 7 becomes `x = f(); note(7, (x), locals())`, and
    `return f()  # (N, C)` becomes `return note(7, f(), locals())`.
    """

    def __init__(self, comments):
        self.comments = comments
        self.fields = {}                       # {class: [(field, its line)]}

    def lines(self, node, end):
        """The lines of a statement that have a shape comment."""
        return [line for line in range(node.lineno, end + 1) if line in self.comments]

    def noted(self, node, value):
        """A value of a statement, handed through note."""
        for line in self.lines(node, node.end_lineno):
            call = ast.parse(f"note({line}, None, locals())", mode="eval").body
            call.args[1] = value
            value = call
        return value

    def visit_Assign(self, node):
        if isinstance(node.value, ast.Lambda):         # the comment states what it returns
            node.value.body = self.noted(node, node.value.body)
            return node
        return self.noted_behind(node, node.targets[0])

    def visit_AugAssign(self, node):
        return self.noted_behind(node, node.target)

    def noted_behind(self, node, target):
        notes = []
        for line in self.lines(node, node.end_lineno):
            notes += ast.parse(f"note({line}, ({ast.unparse(target)}), locals())").body
        return [node, *notes]

    def visit_For(self, node):
        self.generic_visit(node)
        for line in self.lines(node, node.body[0].lineno - 1):
            drawn = ast.unparse(node.target)
            node.body[:0] = ast.parse(f"note({line}, ({drawn}), locals())").body
        return node

    def visit_Return(self, node):
        node.value = self.noted(node, node.value)
        return node

    def visit_ClassDef(self, node):
        self.generic_visit(node)
        self.fields[node.name] = []
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and field.lineno in self.comments:
                self.fields[node.name].append((field.target.id, field.lineno))
        return node


@functools.cache
def noting(source, file):
    """Of a module: its code with the notes, {line: (names in its comment, owner)}, and its fields.

    The owner of a line is the function or class at the top of the module that holds it.
    """
    tree, comments = ast.parse(source), shape_comments(source)
    about = {}
    for node in tree.body:
        owner = getattr(node, "name", None)
        for line in range(node.lineno, node.end_lineno + 1):
            if line in comments:
                about[line] = all_names(comments[line]), owner
    writer = Noting(comments)
    tree = ast.fix_missing_locations(writer.visit(tree))
    return compile(tree, file, "exec"), about, writer.fields


class Watch:
    """Modules that note the shapes of what runs. runs: {(module, line): {(shapes, sizes), ...}}."""

    def __init__(self):
        self.runs, self.sizes, self.fields = {}, {}, {}

    def load(self, name, source, file):
        """The module of this name that notes. Whoever imports the name from now on gets it."""
        code, about, fields = noting(source, str(file))
        self.fields |= {kind: (name, its) for kind, its in fields.items()}

        def note(line, value, variables):
            names, owner = about[line]
            sizes = self.sizes.get((name, owner), {}) | sizes_of(variables)
            # Only the names of the comment, so that a loop of a thousand rounds is noted once.
            known = {key: sizes[key] for key in names & sizes.keys()}
            self.keep(name, line, value, known)
            return value

        module = types.ModuleType(name)
        module.__file__ = str(file)
        module.note = note
        sys.modules[name] = module
        exec(code, vars(module))
        return module

    @contextlib.contextmanager
    def given(self, *functions, **sizes):
        """Within, names have these sizes in the comments of some functions or classes.

        It is for names that no variable there has. What the functions call has its own names.
        """
        self.sizes = {(one.__module__, one.__name__): sizes for one in functions}
        try:
            yield
        finally:
            self.sizes = {}

    def keep(self, name, line, value, sizes):
        run = shapes_of(value), frozenset(sizes.items())
        self.runs.setdefault((name, line), set()).add(run)

    def note_fields(self, value, **sizes):
        """Notes the fields of an instance of a class that has shape comments."""
        name, fields = self.fields[type(value).__name__]
        for field, line in fields:
            self.keep(name, line, getattr(value, field), sizes)


def sizes_of(variables):
    """The sizes of the names that are whole numbers, lists or tuples."""
    sizes = {}
    for name, value in variables.items():
        if type(value) is int:
            sizes[name] = value
        if type(value) in (list, tuple):
            sizes[name] = len(value)
    return sizes


def shapes_of(value):
    """The shapes of all tensors in nested tuples, lists and dictionaries, in their order."""
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape),)
    if isinstance(value, dict):
        value = tuple(value.values())
    shapes = ()
    if isinstance(value, (tuple, list)):
        for part in value:
            shapes += shapes_of(part)
    return shapes


# --- Comparing ------------------------------------------------------------------------------------

OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
              ast.Div: operator.truediv}


@functools.cache
def parsed(term):
    return ast.parse(term, mode="eval").body


def value_of(node, sizes):
    """The number that a term such as C/heads stands for."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return sizes[node.id]
    operation = OPERATIONS[type(node.op)]
    return operation(value_of(node.left, sizes), value_of(node.right, sizes))


def without_open(dimensions, shape):
    """Both without `...` and the dimensions that it takes: those that the others leave."""
    for k, dimension in enumerate(dimensions):
        if is_open(dimension):
            left = len(shape) - len(dimensions) + 1
            rest = shape[k + left:] if left >= 0 else shape
            return dimensions[:k] + dimensions[k + 1:], shape[:k] + rest
    return dimensions, shape


def mismatch(dimensions, shape, sizes):
    """Why a shape is not the stated one; None if it is, as far as the sizes of names are known."""
    dimensions, closed = without_open(dimensions, shape)
    if len(closed) != len(dimensions):
        return f"is {shape}"
    for dimension, size in zip(dimensions, closed):
        if names_in(dimension) <= sizes.keys():
            values = [value_of(parsed(term), sizes) for term in dimension.split(" or ")]
            if size not in values:
                return f"is {shape}, where {dimension} is {' or '.join(map(str, values))}"
    return None


def complaint(text, runs):
    """Why a comment is wrong, cannot be read, or is not checked; None if it is true in all runs."""
    if not read(text):
        return "cannot be read as a shape, or does not begin with one; see tests/test_shapes.py"
    if not runs:
        return "has a shape comment, but no call in tests/test_shapes.py reaches it"
    stated, each = read(text)
    unknown = all_names(text)
    for shapes, known in runs:
        sizes = dict(known)
        # A name that this call gives no size may have one in another call.
        unknown -= sizes.keys()
        expected = stated * len(shapes) if each and len(stated) == 1 else stated
        if len(expected) != len(shapes) or not shapes:
            return f"states {len(stated)} shapes, but there are {len(shapes)}"
        for dimensions, shape in zip(expected, shapes):
            why = mismatch(dimensions, shape, sizes)
            if why:
                return why
    if unknown:
        names = ", ".join(sorted(unknown))
        return f"names {names}, to which no call in tests/test_shapes.py gives a size"
    return None


# --- The calls: small, with sizes that differ, so that a changed order shows ----------------------

def rand(*size):
    return torch.rand(size, generator=torch.Generator().manual_seed(0))


def short_range(first, *rest):
    """Like range, but the long loops of a demo end after two rounds."""
    is_long = first > 50 and not rest
    return range(2 if is_long else first, *rest)


WORDS = rand(5, 7, 24)
TOKENS = torch.ones(5, 7, dtype=torch.long)
CONDITION = rand(5, 24)


def run_toy_data(watch, toy):
    generator = torch.Generator().manual_seed(0)
    granularity = torch.arange(6) % 3
    toy.COLOURS["violet"] = (0.5, -0.8, 0.9)   # five colours on four backgrounds
    toy.WORDS += ("violet",)
    scenes = toy.sample_scenes(6, generator, "target", objects=2)
    watch.note_fields(scenes, n=6, k=2)
    with watch.given(toy.sample_scenes, toy.population, n=6, k=2):
        toy.population(toy.sample_scenes(6, generator, "target", objects=2))
    with watch.given(toy.caption_tokens, toy.view_boxes, toy.coverage, toy.choose, n=6, k=2, p=10):
        toy.views(scenes, granularity, 10)
    with watch.given(toy.render, toy.compose, n=6, k=2, p=10):
        images, _ = toy.views(scenes, granularity, 10)
    for objects, places in ((1, 9), (2, 4)):
        with watch.given(toy.read, n=6, k=objects, p=10, T=18 * places * 16, C=5, B=4):
            toy.read(images, objects=objects)
    with watch.given(toy.accuracies, n=6, k=2):
        for name in toy.GRANULARITIES:
            toy.accuracies(images, scenes, name)


def run_flow_matching(watch, fm):
    x, t = rand(5, 2, 4), rand(5) / 2 + 0.1
    points, groups = rand(7, 2, 4), torch.arange(7) % 3

    def network(x, t, tokens):
        return x

    with watch.given(fm.path, fm.residual, fm.loss, N=5):
        fm.loss(network, x, x, t, TOKENS)
    with watch.given(fm.sample, fm.guided, N=5, T=4):
        fm.sample(network, TOKENS, x, 3, 2.0)
    with watch.given(fm.euler, fm.heun, fm.guided, N=5, T=4):
        fm.euler(fm.guided(network, TOKENS), x, torch.linspace(1, 0, 4))
        fm.heun(fm.guided(network, TOKENS), x, torch.linspace(1, 0, 4))
    with watch.given(fm._exact, fm._posterior_and_velocity, N=5, S=7, D=8):
        fm.exact_velocity(x, t, points)
        fm.exact_velocity(x, t, rand(5, 7, 2, 4))
    with watch.given(fm.loss_floor, fm.group_velocities, N=5, D=8, S=7, G=3):
        fm.loss_floor(x, x, t, points)
        fm.group_velocities(x, t, points, groups)
    with watch.given(fm.data_interaction_matrix, N=5, D=8, G=3):
        fm.data_interaction_matrix(x, rand(5, 3, 2, 4))
    fm.main()


def run_ntk(watch, ntk):
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
    f, params = ntk.of_module(model)           # 44 parameters
    x, r = (rand(6, 3),), rand(6, 4)
    with watch.given(ntk.one_linear_layer, N=6, I=3, O=4, OI=12):
        ntk.one_linear_layer(*x, r)
    with watch.given(ntk.ntk_vector_product, ntk.ntk_blocks, ntk.ntk_trace, N=6, D=4):
        ntk.ntk_vector_product(f, params, x, r)
        ntk.ntk_blocks(f, params, x)
        ntk.ntk_trace(f, params, x)
    with watch.given(ntk.per_sample_gradients, ntk.interaction_matrix, N=6, P=44):
        ntk.interaction_matrix(f, params, x, r)
    with watch.given(ntk.interaction_matrix, chunk=2, P=44):
        ntk.interaction_matrix(f, params, x, r, chunk=2)
    few = (tuple(z[:2] for z in x), r[:2])
    with watch.given(ntk._shares, N=6, N2=2):
        ntk.fast_interaction_matrix(model, x, r, few, check=False)
    with watch.given(ntk._weighted_gradient, ntk._require_same, N=6):
        ntk.fast_interaction_matrix(model, x, r)
        ntk.fast_ntk_blocks(model, x)
        K = ntk.ntk_blocks(f, params, x)
        ntk._require_same(K.transpose(1, 2), r, ntk.interaction_matrix(f, params, x, r))
    with watch.given(ntk.frozen_residuals, N=6, D=4, ND=24):
        ntk.frozen_residuals(K, r.view(6, 2, 2), 0.1)
    run_factors(watch, ntk)
    with watch.given(ntk.conflict_share, N=7, G=3):
        ntk.conflict_share(rand(7, 7), torch.arange(7) % 3)
    with watch.given(ntk.cosines, N=6):
        ntk.cosines(rand(6, 6))
    with watch.given(ntk.step_noise, S=3, N=6):
        ntk.step_noise(rand(6, 6), rand(3, 6))
    with watch.given(ntk.sign_agreement, N=6, D=4, pairs=15):
        ntk.sign_agreement(rand(6, 6), r)
    ntk.main(training=2, moments=(1, 2))


def run_factors(watch, ntk):
    """The gradients of each kind of layer: N samples, C cotangents each."""
    def run(module, given, outputs, **sizes):
        trained = dict(module.named_parameters())
        seen = ntk.Seen(module, trained, given, 0, torch.Size((5, *outputs)), None)
        cotangents = rand(3, 5, *outputs)
        with watch.given(ntk._factors, C=3, N=5, CN=15, **sizes):
            ntk._factors(seen, cotangents, False)
            if not isinstance(module, ntk.NORMS):
                ntk._factors(seen, cotangents, True)

    words = torch.ones(5, 6, dtype=torch.long)
    run(nn.Conv2d(6, 8, 2), rand(5, 6, 5, 2), (8, 4, 1), T=4, I=24, O=8)
    run(nn.Embedding(9, 4), words, (6, 4), T=6, I=9, O=4)
    run(nn.GroupNorm(3, 6), rand(5, 6, 5, 2), (6, 5, 2), T=10, I=6, O=6)
    run(nn.LayerNorm(4), rand(5, 7, 4), (7, 4), T=7, I=4, O=4)
    with watch.given(ntk._add_gradients, P=7):
        ntk._add_gradients(torch.zeros(5, 3, 5, 3), rand(5, 3, 7))
    with watch.given(ntk._add_grams_of_one_place, I=7, O=4):
        ntk._add_grams_of_one_place(torch.zeros(5, 3, 5, 3), rand(5, 3, 7), rand(5, 3, 4))
    with watch.given(ntk._only_places, D=3, T=7):
        ntk._only_places(rand(5, 3, 7, 4))
    with watch.given(ntk._inner_products, N=5, N2=2):
        a, b = rand(5, 7, 4), rand(5, 1, 7, 3)
        ntk._inner_products((a, b), (a[:2], b[:2]))


def run_sga(watch, sga):
    generator = torch.Generator().manual_seed(0)
    root = torch.arange(5).repeat_interleave(3)
    granularity = torch.arange(3).repeat(5)
    with watch.given(sga.decompose, views=1):
        sga.decompose(rand(3, 32, 32), {"meso": (0, 0, 16, 16)}, "caption", 16)
    with watch.given(sga.root_tuples, sga.traded, sga._views_of, n=15, V=15):
        sga.traded(sga.root_tuples(root, generator), granularity, generator)
    with watch.given(sga.all_views, R=5, V=15):
        sga.all_views(torch.ones(5))
    with watch.given(sga.in_conflict, n=15, T=5, V=15):
        sga.in_conflict(sga.root_tuples(root, generator), rand(15, 15))
    with watch.given(sga.plan, sga._places_in_conflict, n=6, V=15):
        sga.plan(root, granularity, sga.ARMS["quiet"], 2, 4, 0, rand(15, 15))
    with watch.given(sga.plan, sga.whole_scenes, R=5, V=15, n=6):
        for name in ("sga", "whole", "baseline"):
            sga.plan(root, granularity, sga.ARMS[name], 2, 4, 0)
    with watch.given(sga._join, n=12):
        sga.plan(root, granularity, sga.Arm(join=2), 2, 4, 0)
    with watch.given(sga.offset_time, sga.min_snr_weight, sga._of_each, n=7):
        sga.offset_time(torch.arange(7) % 3, generator)
        sga.min_snr_weight(rand(7), torch.arange(7) % 3)
    with watch.given(sga.tuple_weights, G=4):
        sga.tuple_weights([1, 2, 3, 1])
    with watch.given(sga.measured_offsets, N=11, L=4):
        four_levels = torch.arange(11) % 4 / 5 + 0.1
        sga.measured_offsets(rand(11, 11), torch.arange(11) % 3, four_levels)
    with watch.given(sga.one_sga_step, sga.deferred_backward, V=24, n=12):
        sga.main()                             # its steps have 4 tuples of 3 views


def run_encoders(watch, net):
    """What stands in both dit.py and unet.py."""
    with watch.given(net.attend, N=5, Q=9, K=7, C=24):
        net.attend(rand(5, 9, 24), WORDS, WORDS, 4)
    with watch.given(net.TextBlock, net.TextEncoder, N=5, L=7, C=24):
        net.TextEncoder(20, 24, 2)(TOKENS)
    with watch.given(net.TimeEncoder, N=5, C=24):
        net.TimeEncoder(24)(rand(5))
    net.sinusoid(rand(7), 10)


def run_dit(watch, dit):
    run_encoders(watch, dit)
    with watch.given(dit.Block, N=5, P=16, C=24, L=7):
        dit.Block(24, 2)(rand(5, 16, 24), WORDS, CONDITION)
    with watch.given(dit.patchify, N=5, P=16, C=3, H=8, W=32, p=4):
        dit.patchify(rand(5, 3, 8, 32), 4)
    with watch.given(dit.unpatchify, N=5, P=16, C=3, H=8, W=8, p=2):
        dit.unpatchify(rand(5, 16, 12), 2)
    with watch.given(dit.DiT, N=5, L=7, C=24, P=16, H=8, W=8, p=2):
        model = dit.DiT(20, 8, 2, 24, 2)
        model(rand(5, 3, 8, 8), rand(5), TOKENS)


def run_unet(watch, unet):
    run_encoders(watch, unet)
    with watch.given(unet.Level, unet.ResidualBlock, unet.Attention, N=5, B=8, H=6, W=4, L=7):
        unet.Level(16, 8, 24, 2)(rand(5, 16, 6, 4), WORDS, CONDITION)
    with watch.given(unet.UNet, N=5, L=7, E=32, C1=8, C2=16, C3=24, H=12, W=12):
        model = unet.UNet(20, 12, (8, 16, 24), 32)
        model(rand(5, 3, 12, 12), rand(5), TOKENS)


def run_train(watch, train):
    report = train.report
    s = train.Settings(**train.PRESETS["tiny", "dit"] | {"probe": 2, "pixels": 8, "arm": "min_snr"})
    run = train.Run(s)
    with watch.given(train.draw_batch, n=4, H=8, W=8):
        train.draw_batch(run, 1)
    run.step = s.pretrain_steps
    with watch.given(train.draw_batch, train.Run, n=6, H=8, W=8):
        run.train_step()
    with watch.given(report.validation_set, n=8, H=8, W=8):
        report.validation_set(s, run.roots, "target", "seen", "meso")
    with watch.given(report.probe_batch, report.probe_row, N=18, H=8, W=8):
        report.probe_row(run.model, report.probe_batch(s, run.roots, 2), [])
    with watch.given(report.products_of_views, N=48):
        report.products_of_views(run)


CALLS = {"toy_data": run_toy_data, "flow_matching": run_flow_matching, "ntk": run_ntk,
         "sga": run_sga, "dit": run_dit, "unet": run_unet, "train": run_train}


@pytest.fixture(scope="module", params=CALLS)
def watch(request):
    """A Watch that has seen what a module does. A demo that paints saves nothing."""
    watch, loaded = Watch(), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)
        for name in MODULES:
            patch.setitem(sys.modules, name, None)     # the patch brings the plain module back
            loaded[name] = watch.load(name, SOURCES[name], file_of(name))
            loaded[name].range = short_range
            if name == "support.report":
                patch.setattr(support, "report", loaded[name])
        CALLS[request.param](watch, loaded[request.param])
    watch.judged = [request.param]
    if request.param == "train":
        watch.judged.append("support.report")
    return watch


# --- The tests ------------------------------------------------------------------------------------

COMMENTS = {module: shape_comments(source) for module, source in SOURCES.items()}


def comments_of(watch):
    """(where, text, its runs) of every shape comment of the modules that a Watch is to judge."""
    for module in watch.judged:
        for line, text in COMMENTS[module].items():
            yield f"{module}, line {line}", text, watch.runs.get((module, line), set())


def test_every_shape_comment_is_true_and_checked(watch):
    wrong = []
    for where, text, runs in comments_of(watch):
        why = complaint(text, runs)
        if why:
            wrong.append(f"{where}: `{text}` {why}")
    assert not wrong, "\n" + "\n".join(wrong)


def altered(shape):
    """The shapes that differ from a stated one: a dimension larger, of another name, swapped."""
    for k, dimension in enumerate(shape):
        before, after = shape[:k], shape[k + 1:]
        if not is_open(dimension):
            yield [*before, f"{dimension} + 1", *after]
        if dimension.isidentifier():
            yield [*before, "Z", *after]
        # Images are square: H and W may trade places.
        if after and after[0] != dimension.replace("H", "W"):
            yield [*before, after[0], dimension, *after[1:]]


def alterations(text):
    """The comment with each of its shapes altered in turn."""
    shapes, each = read(text)
    for k, shape in enumerate(shapes):
        for other in altered(shape):
            written = [f"({', '.join(one)},)" for one in [*shapes[:k], other, *shapes[k + 1:]]]
            yield ", ".join(written) + (" each" if each else "")


def test_every_altered_comment_is_noticed(watch):
    """The twin."""
    for where, text, runs in comments_of(watch):
        if complaint(text, runs) is None:
            for other in alterations(text):
                assert complaint(other, runs), f"{where}: `{text}` could as well be `{other}`"


SMALL = """
def f(x, rows):
    y = g(x)  # (N, 3)
    for row in y:  # (3,)
        y = y + 1  # of size (N, C)
    # (9, 9)
    z = g(y)  # see it (Eq. 3, 4)
    pair = [y, x]  # (N, 3), (N, rows)
    return y.T  # (rows, N)


def g(x):
    if len(x) > 99:
        return x  # (N, N)
    return x * 1  # (N, 3)
"""


def test_a_comment_that_is_wrong_or_not_read_or_not_reached_is_noticed():
    watch = Watch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "small", None)
        small = watch.load("small", SMALL, "small.py")
        with watch.given(small.f, small.g, N=5):
            small.f(rand(5, 3), 3)
    comments = shape_comments(SMALL)
    assert [line for line, _ in sorted(comments.items())] == [3, 4, 5, 8, 9, 14, 15]
    why = {line: complaint(text, watch.runs.get(("small", line), set()))
           for line, text in comments.items()}
    assert [line for line in why if why[line] is None] == [3, 4, 8, 9, 15]
    assert "cannot be read" in why[5]
    assert "no call in tests/test_shapes.py reaches it" in why[14]
    assert "N" in complaint("(N, 3)", {(((5, 3),), frozenset())})
    assert "states 1 shapes, but there are 2" in complaint("(5,)", {(((5,), (5,)), frozenset())})
