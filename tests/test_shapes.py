"""The comments that state a shape are true: the code runs, and what such a line assigns or returns has the shape that it states.

Such a comment begins with the shape: `(N, P, C)`, `(N, L, C), (N, C)` for two targets, `(n, k, 3) each` for all of them. A dimension
is a number, a name, or a term of these: C/heads, N - i, HW for H*W, Q or K. `...` and *name stand for any others. The size of a name
is that of the variable of this name (a list's length), or the one that a call below gives. A `for` states what it draws, a lambda what
it returns, a class what its fields hold. The words after the shape are free.
"""

import ast
import functools
import io
import re
import runpy
import sys
import tokenize
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn
from torch.func import functional_call

import dit
import flow_matching as fm
import ntk
import sga
import toy_data as toy
import train
import unet

FILES = {module.__file__: module.__name__ for module in (toy, fm, ntk, sga, dit, unet, train)}


# --- reading ---

@functools.cache
def read(text):
    """The shapes that a comment begins with, as lists of dimensions, and whether each target has them; None if it has another form."""
    form = re.match(r"(\([^()]*\)(?:, \([^()]*\))*)( each\b)?", text)
    shapes = [[d.strip() for d in shape.removesuffix(",").split(",") if shape] for shape in form[1][1:-1].split("), (")] if form else [[""]]
    if not all(re.fullmatch(r"\.\.\.|\*?\w+(?:(?: ?[-+*/] ?| or )\w+)*", d) for shape in shapes for d in shape):
        return None
    factors = lambda letters: "*".join(re.findall(r"\d+|[A-Za-z]", letters[0]))                    # HW to H*W, 3pp to 3*p*p
    return [[re.sub(r"\b(\d+[A-Za-z]+|[A-Z]{2,}|pp)\b", factors, d) for d in shape] for shape in shapes], bool(form[2])


def names_in(dimension):
    return set() if dimension[0] in ".*" else set(re.findall(r"[A-Za-z]\w*", dimension)) - {"or"}


def shape_comments(source):
    """{line: text} of the comments after code that begin with a bracket, or hold further on what looks like a shape."""
    lines, found = source.splitlines(), {}
    for kind, string, (line, column), *_ in tokenize.generate_tokens(io.StringIO(source).readline):
        text = string[1:].strip()
        if kind == tokenize.COMMENT and lines[line - 1][:column].strip() and re.search(r"^\(|\((\d+|n|[A-Z]\d?|\.\.\.),", text):
            found[line] = text
    return found


def places(source):
    """{(whether a lambda is meant, line): (line of the comment, target or None for what is returned)}, {class: [(field, its line)]}."""
    comments, statements, fields = shape_comments(source), {}, {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            fields[node.name] = [(field.target.id, field.lineno) for field in node.body if isinstance(field, ast.AnnAssign) and field.lineno in comments]
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.For, ast.Return)):
            inside = isinstance(getattr(node, "value", None), ast.Lambda)
            target = None if inside or isinstance(node, ast.Return) else node.targets[0] if isinstance(node, ast.Assign) else node.target
            lines = range(node.lineno, node.body[0].lineno if isinstance(node, ast.For) else node.end_lineno + 1)
            for comment in comments.keys() & lines:
                statements |= dict.fromkeys([(inside, line) for line in lines], (comment, target and ast.unparse(target)))
    return statements, fields


SOURCES = {module: Path(file).read_text() for file, module in FILES.items()}
PLACES = {module: places(source) for module, source in SOURCES.items()}
NO_TENSORS = {("train", "of ((n,), (n,))")}                                # the one exemption: a list of pairs
COMMENTS = {(module, line): text for module, source in SOURCES.items() for line, text in shape_comments(source).items()
            if (module, text) not in NO_TENSORS}


# --- running ---

def shapes_of(value):
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape),)
    return sum(map(shapes_of, value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()), ())


class Watch:
    """seen: {(module, line), shapes, sizes of names} of every statement with a shape comment that has run."""

    def __init__(self):
        self.seen, self.depth = set(), 0

    def __call__(self, work, **sizes):
        """work(), watched; the sizes hold in the functions that it calls itself and in their lambdas, but not in what these call."""
        self.sizes, before = sizes, sys.gettrace()
        sys.settrace(self.enter)
        try:
            return work()
        finally:
            sys.settrace(before)

    def enter(self, frame, event, arg):
        code, module = frame.f_code, FILES.get(frame.f_code.co_filename)
        if module is None or re.fullmatch("<.*(expr|comp)>", code.co_name):
            return None
        (statements, fields), lambdas, now = PLACES[module], code.co_qualname.count("<lambda>"), None
        given = {} if self.depth and not lambdas else self.sizes
        self.depth += 1

        def note(line, value, variables):
            sizes = {name: z if type(z) is int else len(z) for name, z in variables.items() if type(z) in (int, list, tuple)}
            self.seen.add(((module, line), shapes_of(value), frozenset((given | sizes).items())))

        def step(frame, event, arg):
            nonlocal now
            after = statements.get((lambdas, frame.f_lineno)) if event == "line" else None
            if now and now is not after and event != "exception":          # the statement has ended
                note(now[0], arg if now[1] is None else eval(now[1], frame.f_globals, frame.f_locals), frame.f_locals)
            now = after
            if event == "return":
                self.depth -= 1
                for name, line in fields.get(type(arg).__name__, []):
                    note(line, getattr(arg, name), {})
            return step

        return step


# --- comparing ---

def complaints(comments, seen):
    """{(module, line): why} of the comments that are wrong, that cannot be read, or that nothing checks."""
    wrong, unchecked = {}, {}
    for key, shapes, sizes in (one for one in seen if one[0] in comments):
        sizes, (stated, each) = dict(sizes), read(comments[key]) or ([], False)
        unchecked[key] = unchecked.get(key, set().union(*map(names_in, sum(stated, [])))) - sizes.keys()
        if len(stated) != len(shapes) and not (each and len(stated) == 1 and shapes):
            wrong[key] = f"states {len(stated)} shapes, but there are {len(shapes)}"
        for dimensions, shape in zip(stated * len(shapes) if each else stated, shapes):
            rest = next((k for k, d in enumerate(dimensions) if d[0] in ".*"), None)
            if len(shape) < len(dimensions) - 1 if rest is not None else len(shape) != len(dimensions):
                wrong[key] = f"is {shape}"
                continue
            for k, d in enumerate(dimensions):
                if k != rest and names_in(d) <= sizes.keys():                  # a name of unknown size: another call must say it
                    values = [eval(way, {}, sizes) for way in d.split(" or ")]
                    if shape[k if rest is None or k < rest else k - len(dimensions)] not in values:
                        wrong[key] = f"is {shape}" + (f", where {d} is {' or '.join(f'{z:g}' for z in values)}" if names_in(d) else "")
    for key, text in comments.items():
        if not read(text):
            wrong[key] = "cannot be read as a shape, or does not begin with it; see the top of tests/test_shapes.py"
        elif key not in unchecked:
            wrong[key] = "has a shape comment but no call in tests/test_shapes.py reaches it"
        elif unchecked[key]:
            wrong.setdefault(key, f"names {', '.join(sorted(unchecked[key]))}, which no call in tests/test_shapes.py gives a size")
    return wrong


# --- the calls: small, with sizes that differ, so that a changed order shows ---

def rand(*size):
    return torch.rand(size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def seen():
    """What every function does with small inputs. The demos draw, but save nothing, and their long loops end early."""
    see, generator = Watch(), torch.Generator().manual_seed(0)
    for file in FILES:
        see(lambda: runpy.run_path(file))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)
        for module in (fm, ntk, sga, dit, unet):
            patch.setattr(module, "range", lambda *a: range(min(a[0], 2) if len(a) == 1 and a[0] > 100 else a[0], *a[1:]), raising=False)
            see(module.main)
        plt.close("all")

        scenes, views = see(lambda: toy.sample_scenes(6, generator, "target", objects=2), n=6, k=2), torch.arange(6) % 3
        boxes, _ = see(lambda: (toy.view_boxes(scenes, views), toy.caption_tokens(scenes, views)), n=6, k=2)
        patch.setitem(toy.COLOURS, "violet", (0.5, -0.8, 0.9))             # five colours on four backgrounds
        images = see(lambda: (toy.coverage(scenes, boxes, 10), toy.render(scenes, boxes, 10)), n=6, k=2, p=10)[1]
        see(lambda: toy.read(images, objects=2), T=18 * 4 * 16, k=2, p=10, C=5, B=4)
        see(lambda: toy.read(images), T=18 * 9 * 16, k=1, p=10, C=5, B=4)
        see(lambda: toy.accuracies(images, scenes), n=6)

    x, t, points, groups = rand(5, 2, 4), rand(5) / 2 + 0.1, rand(7, 2, 4), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    see(lambda: fm.loss(lambda x, t, tokens: x, x, None, t, x), N=5)
    see(lambda: [fm.posterior(x, t, points), fm.posterior(x, t, rand(5, 7, 2, 4)), fm.exact_velocity(x, t, points)], N=5, D=8, K=7)
    see(lambda: [fm.loss_floor(x, x, t, points), fm.group_velocities(x, t, points, groups)], N=5, K=7, G=3)
    see(lambda: fm.data_interaction_matrix(x, rand(5, 3, 2, 4)), N=5, D=8, G=3)

    model, r = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)), rand(6, 4)
    f, params, inputs = lambda weights, x: functional_call(model, weights, (x,)), dict(model.named_parameters()), (rand(6, 3),)
    see(lambda: [ntk.ntk_vector_product(f, params, inputs, r), ntk.ntk_blocks(f, params, inputs), ntk.ntk_trace(f, params, inputs)], N=6, D=4)
    see(lambda: [ntk.jacobian_contraction(f, params, inputs), ntk.fast_ntk_blocks(model, inputs)], N=6, D=4)
    see(lambda: ntk.interaction_matrix(f, params, inputs, r, chunk=2), chunk=2, P=44)
    see(lambda: ntk.interaction_matrix(f, params, inputs, r), N=len(r), P=44)
    see(lambda: ntk._share(nn.Conv2d(6, 8, 2), rand(5, 6, 5, 2), rand(3, 5, 8, 4, 1)), C=3, N=5, T=4, I=24, O=8)
    see(lambda: ntk._share(nn.Embedding(9, 4), torch.ones(5, 6, dtype=torch.long), rand(3, 5, 6, 4)), C=3, N=5, T=6, I=9, O=4)
    see(lambda: ntk._share(nn.GroupNorm(3, 6), rand(5, 6, 5, 2), rand(3, 5, 6, 5, 2)), C=3, N=5, T=10, I=6, O=6)
    see(lambda: ntk._share(nn.LayerNorm(4), rand(5, 7, 4), rand(3, 5, 7, 4)), C=3, N=5, T=7, I=4, O=4)
    see(lambda: [ntk._gram(rand(2, 5, 3, 4)), ntk._linear_share(rand(5, 3, 6), rand(2, 5, 3, 8))], C=2, N=5, P=12)
    see(lambda: ntk.conflict_share(rand(7, 7), groups), N=7, G=3)

    see(lambda: next(sga.root_tuples(torch.arange(5).repeat_interleave(3), generator)), V=15)
    see(lambda: [sga.offset_time(groups, generator), sga.min_snr_weight(rand(7), groups)], n=7)
    see(lambda: sga.measured_offsets(rand(11, 11), torch.arange(11) % 3, torch.arange(11) % 4 / 5 + 0.1), N=11, L=4)

    words, tokens, condition = rand(5, 7, 24), torch.ones(5, 7, dtype=torch.long), rand(5, 24)
    for net in (dit, unet):
        see(lambda: [net.sinusoid(rand(7), 10), net.attend(rand(5, 6, 24), words, words, 4)], N=5, Q=6, K=7, C=24)
        see(lambda: [net.TextBlock(24, 2)(words), net.TextEncoder(20, 24, 2)(tokens), net.TimeEncoder(24)(rand(5))], N=5, L=7, C=24)
    see(lambda: [dit.Block(24, 2)(rand(5, 16, 24), words, condition), dit.patchify(rand(5, 3, 8, 32), 4)], N=5, P=16, C=24, H=8, W=32, p=4)
    see(lambda: dit.unpatchify(rand(5, 16, 12), 2), N=5, H=8, W=8, p=2)
    model = dit.DiT(20, 8, 2, 24, 2)
    see(lambda: [model(rand(5, 3, 8, 8), rand(5), tokens), model.positions(rand(5, 3, 8, 8))], N=5, L=7, C=24, P=16, H=8, W=8, p=2)
    x = rand(5, 16, 6, 4)
    see(lambda: [unet.ResidualBlock(16, 8, 24)(x, condition), unet.Attention(8, 24, 2)(rand(5, 8, 6, 4), words)], N=5, B=8, H=6, W=4)
    see(lambda: unet.Level(16, 8, 24, 2)(x, words, condition), N=5, B=8, H=6, W=4)
    see(lambda: unet.UNet(20, 12, (8, 16, 24), 32)(rand(5, 3, 12, 12), rand(5), tokens), N=5, L=7, E=32, C1=8, C2=16, C3=24, H=12, W=12)

    settings = train.Settings(**train.PRESETS["tiny", "dit"] | {"probe": 2})
    see(lambda: train.make_plan(settings), V=12)
    _, u, labels = see(lambda: train.probe_batch(settings), N=18)
    see(lambda: train.geometry(rand(18, 18), u, labels), pairs=153)
    return see.seen


def test_every_shape_comment_is_true_and_checked(seen):
    wrong = complaints(COMMENTS, seen)
    assert not wrong, "\n" + "\n".join(f"{module}.py:{line} `{COMMENTS[module, line]}` {why}" for (module, line), why in sorted(wrong.items()))


def alterations(text):
    """The comment with two dimensions changed round, with one that is larger by one, with one of another name; for all of them in turn."""
    shapes, each = read(text)
    for i, shape in enumerate(shapes):
        for k, d in enumerate(shape):
            others = [[*shape[:k], name, *shape[k + 1:]] for name in ["Z"] * d.isidentifier() + [f"{d} + 1"] * (d[0] not in ".*")]
            if shape[k + 1:] and shape[k + 1] != d.replace("H", "W"):      # images are square: H and W may trade places
                others.append([*shape[:k], shape[k + 1], d, *shape[k + 2:]])
            for other in others:
                yield ", ".join(f"({', '.join(dimensions)},)" for dimensions in [*shapes[:i], other, *shapes[i + 1:]]) + " each" * each


@pytest.mark.parametrize("module", SOURCES)
def test_every_altered_comment_is_noticed(seen, module):
    """The twin."""
    for key in (key for key in COMMENTS if key[0] == module):
        ran = [one for one in seen if one[0] == key]
        for text in alterations(COMMENTS[key]):
            assert complaints({key: text}, ran), f"{module}.py:{key[1]} `{COMMENTS[key]}` could as well be `{text}`"


def test_a_comment_that_is_not_reached_or_not_read_is_noticed():
    source = "x = f()  # (N, C)\ny = g()  # of size (N, C)\n# (N, C)\nz = h(x, y)  # see it (Eq. 3, 4)\nw = 1  # (P of it, N)\n"
    assert shape_comments(source) == {1: "(N, C)", 2: "of size (N, C)", 5: "(P of it, N)"}
    found = complaints(shape_comments(source), [])
    assert "no call in tests/test_shapes.py reaches it" in found[1] and "cannot be read" in found[2] and "cannot be read" in found[5]
