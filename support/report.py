"""What a run is judged by: validation with the exact velocity, samples under the reader's eyes,
and the interaction matrix of a probe batch; the rows of the log and the report at the end.
"""

import copy
import dataclasses
import json
import math
import os
import time

import torch

import flow_matching as fm
import ntk
import sga
import toy_data
from support import book, machine, pictures

VIEWS = toy_data.GRANULARITIES
MEASURES = ("loss", "error", "floor")
LEVELS = (0.2, 0.5, 0.8)                       # the noise levels t of the probe batch
COLUMNS = ["step", "phase", "images", "lr", "loss", "grad_norm", "images_per_s"]
COLUMNS += [f"val_{measure}_{view}" for measure in MEASURES for view in VIEWS]


def pretraining_views(s):
    """The granularities that the pretraining draws."""
    return VIEWS if s.pretrain_views == "all" else ("macro",)


# --- Validation: fixed images, every noise level, the exact velocity ------------------------------

def test_scenes(s, roots, domain, split, stream):
    """Scenes to test on. On the target domain "seen" means the captions of the roots."""
    scenes = toy_data.sample_scenes(s.eval_images, machine.seeded(s, stream), domain, split,
                                    s.objects)
    if (domain, split) == ("target", "seen"):
        root = torch.arange(s.eval_images, device=s.device) % s.roots
        scenes = roots.take(root)._replace(nuisance=scenes.nuisance)
    return scenes


test_scenes.__test__ = False                   # its name looks like a test's to pytest


def validation_set(s, roots, domain, split, view):
    """x0, e, t, tokens and the exact velocity u* at evenly spread t = 1/(2n), 3/(2n), ..."""
    scenes = test_scenes(s, roots, domain, split, 2)
    n = s.eval_images
    x0, tokens = toy_data.views(scenes, view, s.pixels)
    e = torch.randn(x0.shape, generator=machine.seeded(s, 3), device=s.device)
    t = (torch.arange(n, device=s.device) + 0.5) / n

    # All images that a caption may stand for, so that its best possible velocity is known.
    population, _ = toy_data.views(toy_data.population(scenes), view, s.pixels)
    points = population.unflatten(0, (n, -1))                      # (n, 18, 3, H, W)
    u_star = fm.exact_velocity(fm.path(x0, e, t), t, points)       # (n, 3, H, W)
    return x0, e, t, tokens, u_star


@torch.no_grad()
def validate(model, held, s):
    """The means over a validation set of the three terms of Eq. 5, each over D.

    They are the loss |v - u|^2, the error |v - u*|^2 and the floor |u - u*|^2.
    """
    x0, e, t, tokens, u_star = held
    x_t, u = fm.path(x0, e, t), fm.target(x0, e)
    network = machine.in_precision(model, s)
    v = torch.cat([network(*some).float()
                   for some in zip(x_t.split(256), t.split(256), tokens.split(256))])
    return {"loss": (v - u).square().mean().item(),
            "error": (v - u_star).square().mean().item(),
            "floor": (u - u_star).square().mean().item()}


# --- Samples, and what the reader finds in them ---------------------------------------------------

def sample_images(model, tokens, s, generator):
    """(n, 3, pixels, pixels) what the model makes of n captions, from the generator's noise."""
    noise = torch.randn(len(tokens), 3, s.pixels, s.pixels, generator=generator, device=s.device)
    return fm.sample(machine.in_precision(model, s), tokens, noise, s.sample_steps, s.guidance)


def draw_captions(model, s, captions, tokens, picture):
    """Four samples of each caption, in a picture."""
    tokens = tokens.repeat_interleave(4, 0).to(s.device)
    images = sample_images(model, tokens, s, machine.seeded(s, 0)).unflatten(0, (-1, 4))
    try:
        pictures.draw_captions(captions, images, picture)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        book.stop(f"{picture} could not be drawn ({in_one_line(error)})")
    print(f"four samples of each caption are in {picture}")


def in_one_line(error):
    """What an error says first."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def not_taught(caption, s, step):
    """A sentence: what a caption of the grammar asks for that the last phase had not; else "".

    A fine-tuned network forgets what it was pretrained on.
    """
    words, whose = caption.split(), f"the caption {caption!r}"
    phase, domain, views = "pretraining", "base", pretraining_views(s)
    if step > s.pretrain_steps:
        phase, domain = "fine-tuning", "target"
        views = ("macro",) if sga.ARMS[s.arm].whole else VIEWS
    shapes, textures, backgrounds = toy_data.DOMAINS[domain]
    names = list(toy_data.BACKGROUNDS)
    new = {*toy_data.SHAPES[shapes:], *toy_data.TEXTURES[textures:], *names}
    new -= {names[background] for background in backgrounds}
    objects = 2 if {"of", "above", "below"}.intersection(words) else 1
    if words[0] == "macro" and objects != s.objects:
        return f"{whose} names objects: {objects}, and the scenes of the {phase} had {s.objects}"
    if words[0] not in views:
        return f"{whose} is {words[0]}, and no view of the {phase} was"
    unknown = [word for word in words if word in new]
    if unknown:
        return f"{whose} has the word {unknown[0]!r}, and no image of the {phase} had it"
    return ""


def say_what_was_never_trained(captions, s, step=math.inf):
    """One sentence for each request that the network can answer with a guess only."""
    for caption in captions:
        if caption.split():
            wrong = toy_data.grammar_error(caption) or not_taught(caption, s, step)
        else:                                  # the null caption, which guidance needs too
            wrong = "" if s.caption_dropout else "the null caption was never trained"
        if wrong:
            print(f"train.py: {wrong}; it is drawn all the same")
    if s.guidance != 1 and s.caption_dropout == 0:
        print("train.py: the null caption was never trained (--caption_dropout 0), so that "
              "guidance other than 1 is a guess")
    if s.caption_dropout == 1:
        print("train.py: no caption was ever trained (--caption_dropout 1), so that none is "
              "followed")


def wilson(share, n, z=1.96):
    """The 95% Wilson interval of a share of n."""
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return [max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)]


def share(found):
    """The share of true entries."""
    return found.float().mean().item()


def evaluate(model, s, roots, domain, split, view):
    """One row of the report: validation, and what the reader finds in samples and real images."""
    scenes = test_scenes(s, roots, domain, split, 4)
    x0, tokens = toy_data.views(scenes, view, s.pixels)
    images = sample_images(model, tokens, s, machine.seeded(s, 5))
    found = toy_data.accuracies(images, scenes, view)
    limit = toy_data.largest_real_residual(view, s.pixels, s.objects)

    row = {"domain": domain, "split": split, "view": view}
    row |= validate(model, validation_set(s, roots, domain, split, view), s)
    for name in ("layout", "shape_colour", "texture", "joint"):
        row[name] = share(found[name])
    row["interval"] = wilson(row["joint"], s.eval_images)
    row["ceiling"] = share(toy_data.accuracies(x0, scenes, view)["joint"])
    row["valid"] = share(found["residual"] <= limit)
    return row


# --- The probe: the geometry while it evolves (Eq. 12, 13, 16, 17) --------------------------------

def probe_batch(s, roots, number):
    """Inputs and target of the first roots' views at three noise levels, and each sample's labels.

    The labels (N, 3) are a sample's root, granularity and noise level, N = 9 * number.
    """
    three = torch.arange(3)
    labels = torch.cartesian_prod(torch.arange(number), three, three).to(s.device)
    root, granularity, level = labels.T
    x0, tokens = toy_data.views(roots.take(root), granularity, s.pixels)
    e = torch.randn(x0.shape, generator=machine.seeded(s, 3), device=s.device)
    t = torch.tensor(LEVELS, device=s.device)[level]
    return (fm.path(x0, e, t), t, tokens), fm.target(x0, e), labels


@torch.no_grad()
def residuals_of(model, inputs, u):
    """r = v - u of a probe batch (Eq. 3), in float32."""
    some_at_a_time = zip(*(z.split(64) for z in inputs))
    return torch.cat([model(*some) for some in some_at_a_time]) - u


def interaction_matrix_of(model, inputs, vectors, columns=None):
    """(N, N) M of a batch, in float64 where float32 has too few digits for it (Eq. 12).

    With columns = (inputs, vectors) of a second batch it is (N, N2), as in ntk.py (Eq. 22). Digits
    are too few if weights have become very large. ntk.py then refuses M, which must not end a run.
    """
    try:
        return ntk.fast_interaction_matrix(model, inputs, vectors, columns)
    except ValueError:
        wide = copy.deepcopy(model).double()
        if columns:
            columns = in_float64(columns[0]), columns[1].double()
        M = ntk.fast_interaction_matrix(wide, in_float64(inputs), vectors.double(), columns)
        return M.to(vectors.dtype)


def in_float64(inputs):
    """Images and noise levels in float64; tokens stay whole numbers."""
    return tuple(z.double() if z.is_floating_point() else z for z in inputs)


def probe_row(model, batch, before):
    """M of the trained weights, not the averaged ones, and what it says. The run is not changed.

    The kernel K itself is too large to keep. Its drift (Eq. 16) is that of u_i^T K_ij u_j, the
    kernel seen by vectors that stay the same, the targets. The first row keeps this matrix.
    """
    inputs, u, labels = batch
    r = residuals_of(model, inputs, u)
    M = interaction_matrix_of(model, inputs, r)                    # (N, N)
    seen = interaction_matrix_of(model, inputs, u)                 # (N, N)
    first = before[0]["kernel"].to(seen) if before else seen       # (N, N)
    trace, cross = ntk.loss_velocity(M)
    agreement, by_chance = ntk.sign_agreement(M, r)
    row = {"drift": ntk.kernel_drift(seen, first).item(),
           "trace": trace.item(), "cross": cross.item(),
           "conflict": ntk.conflict_share(M).item(),
           "sign_agreement": agreement.item(), "sign_by_chance": by_chance.item(),
           "pairs": ntk.pairs_by_kind(M, labels, ("root", "view", "level")),
           "M": M.cpu()}
    if not before:
        row["kernel"] = seen.cpu()
    return row


def measured_offsets(run):
    """In the arm `measured`: the offsets that the interaction matrix of a few roots asks for."""
    s = run.settings
    inputs, u, labels = probe_batch(s, run.roots, min(6, s.roots))
    r = residuals_of(run.model, inputs, u)
    M = interaction_matrix_of(run.model, inputs, r)
    granularity, t = labels[:, 1], inputs[1]
    return tuple(sga.measured_offsets(M, granularity, t).tolist())


@torch.no_grad()
def products_of_views(run, repeats=4):
    """(V, V) the inner products of the views' mean gradients, for the arm `quiet`.

    Each view is seen in `repeats` samples, at noise levels of the baseline: N = V repeats in all.
    For two views the mean over pairs of samples estimates the product of their expected gradients.
    """
    s, generator = run.settings, machine.seeded(run.settings, 3)
    V = len(run.root)
    view = torch.arange(V, device=s.device).repeat_interleave(repeats)     # (N,)
    granularity = run.granularity[view]
    x0, tokens = toy_data.views(run.roots.take(run.root[view]), granularity, s.pixels)
    t = sga.offset_time(granularity, generator, (0.0, 0.0, 0.0), s.time_mean, s.time_std,
                        s.time_shift)
    e = torch.randn(x0.shape, generator=generator, device=s.device)
    inputs = (fm.path(x0, e, t), t, tokens)
    r = residuals_of(run.model, inputs, fm.target(x0, e))
    M = interaction_matrix_of(run.model, inputs, r)                # (N, N)
    return M.view(V, repeats, V, repeats).mean((1, 3)).cpu()


# --- What must stay finite ------------------------------------------------------------------------

class Finite:
    """Notices what is not finite first, and at which step, without making a GPU wait in a step."""

    # In the order in which one spoils the next, and what may help.
    WATCHED = ("a noise level", "a sample's weight in the loss", "the loss", "the gradient")
    ADVICE = {"the loss": "; a lower --lr or --finetune_lr may help",
              "the gradient": ", although its loss is; a lower --lr or --finetune_lr may help"}

    def __init__(self, device):
        self.first_step = torch.zeros(len(self.WATCHED), dtype=torch.long, device=device)

    def watch(self, step, *values):
        bad = torch.stack([~value.isfinite().all() for value in values])
        unseen = self.first_step == 0
        self.first_step = torch.where(unseen & bad, step, self.first_step)

    def check(self):
        """Stops and says what was not finite, if anything was."""
        steps = machine.largest_of_all(self.first_step).tolist()
        found = [pair for pair in zip(steps, self.WATCHED) if pair[0]]
        if found:
            step, what = min(found, key=lambda pair: pair[0])
            book.stop(f"{what} of step {step} is not finite{self.ADVICE.get(what, '')}")


# --- How far a run is -----------------------------------------------------------------------------

def images_until(run, step):
    """How many images the run has seen after a step."""
    s = run.settings
    planned = run.plan[:max(step - s.pretrain_steps, 0)]
    return min(step, s.pretrain_steps) * s.batch + sum(len(views) for views, _ in planned)


# --- What a run says at its start -----------------------------------------------------------------

def announce(run, folder):
    """The network and the folder, what the fine-tuning will be, and what will be a guess."""
    s = run.settings
    size = sum(weight.numel() for weight in run.model.parameters())
    images = sum(len(views) for views, _ in run.plan)
    print(f"{s.model} with {size:,} parameters on {s.device}, {s.pixels} px, from step {run.step}: "
          f"{folder}")
    trained = f"adapters of rank {s.rank}" if s.rank else "all weights"
    print(f"fine-tuning: arm {s.arm}, {trained}, {len(run.plan)} optimizer steps, "
          f"{images:,} images in all", flush=True)
    say_what_was_never_trained([], s)


# --- Rows of the log ------------------------------------------------------------------------------

EARLY = 20                                     # steps after a phase's first: a line of progress


class Recorder:
    """Adds a row to a run's log, and to its probe, whenever one is due; says how far it is."""

    def __init__(self, run):
        s, roots = run.settings, run.roots
        self.held = {}
        for view in pretraining_views(s):
            self.held["pretrain", view] = validation_set(s, roots, "base", "seen", view)
        for view in VIEWS:
            self.held["finetune", view] = validation_set(s, roots, "target", "seen", view)
        self.probing = probe_batch(s, roots, s.probe) if s.probe else None
        if s.probe and not run.probe:
            self.add_probe(run)
        self.phase = None                      # of the last step whose time was left out
        self.start_the_clock(run)

    def start_the_clock(self, run):
        self.clock, self.images = time.time(), images_until(run, run.step)

    def pass_over(self, run, phase):
        """After a step that has no row.

        The first step of a phase may take long, because it compiles. Its time counts in
        run.seconds, but not in the speed. EARLY steps later a line says how far the run is.
        """
        if phase != self.phase:
            self.phase, self.first_step = phase, run.step
            run.seconds += time.time() - self.clock
            self.start_the_clock(run)
        elif run.step == self.first_step + EARLY:
            loss = run.loss.item()             # a GPU has done its work once this is known
            say_progress(run, phase, loss, self.speed(run))

    def speed(self, run):
        """Images in a second, since the clock was started."""
        return (images_until(run, run.step) - self.images) / (time.time() - self.clock)

    def add_probe(self, run):
        row = {"step": run.step, "offsets": run.offsets}
        run.probe.append(row | probe_row(run.model, self.probing, run.probe))

    def add_row(self, run, phase, norm):
        """The row of the step that was just made; norm is that of its gradient."""
        speed = self.speed(run)
        run.seconds += time.time() - self.clock
        row = {"step": run.step, "phase": phase, "images": images_until(run, run.step),
               "lr": run.optimizer.param_groups[0]["lr"], "loss": run.loss.item(),
               "grad_norm": norm.item(), "images_per_s": speed}
        for (its_phase, view), held in self.held.items():
            if its_phase == phase:
                for measure, value in validate(run.ema, held, run.settings).items():
                    row[f"val_{measure}_{view}"] = value
        run.log.append(row)
        if self.probing:
            self.add_probe(run)

        say_progress(run, phase, row["loss"], speed)
        self.start_the_clock(run)


def say_progress(run, phase, loss, speed):
    """How far the run is, its loss and speed, and how long the rest of the training will take."""
    images_left = images_until(run, run.last) - images_until(run, run.step)
    left = int(images_left / speed)
    print(f"{phase} step {run.step}/{run.last}  loss {loss:.4f}  {speed:.0f} images/s  "
          f"{left // 60}:{left % 60:02} left", flush=True)


def save_all(run, folder):
    """The checkpoint, at the end of the pretraining a second one, and the rows so far as text."""
    if run.step == run.settings.pretrain_steps:
        run.save(os.path.join(folder, "pretrained.pt"))
    run.save(os.path.join(folder, "checkpoint.pt"))
    book.write_rows(run.log, run.probe, COLUMNS, folder)


# --- The end of a run -----------------------------------------------------------------------------

HEAD = ("model      captions         view  val loss  floor |v-u*|^2 layout  shape textur  joint"
        "  95% interval ceiling  valid")


def line_of(row):
    """A row of the report's table as text."""
    captions = f"{row['domain']} {row['split']}"
    low, high = row["interval"]
    measured = f"{row['loss']:8.4f} {row['floor']:6.4f} {row['error']:8.4f}"
    read = " ".join(f"{row[name]:6.1%}" for name in ("layout", "shape_colour", "texture", "joint"))
    return (f"{row['model']:10} {captions:16} {row['view']:5} {measured} {read}"
            f" {low:6.1%}-{high:6.1%} {row['ceiling']:7.1%} {row['valid']:6.1%}")


def device_name(s):
    if s.device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def report(run, pretrained, folder):
    """Evaluates the pretrained and the fine-tuned model: a table, report.json, and the pictures."""
    s = run.settings
    tasks = []
    for split in ("seen", "held_out"):
        tasks += [("pretrained", pretrained, "base", split, view) for view in pretraining_views(s)]
    for split in ("seen", "held_out"):
        tasks += [("fine-tuned", run.ema, "target", split, view) for view in VIEWS]
    rows = []
    print("\n" + HEAD)
    for name, model, domain, split, view in tasks:
        row = {"model": name} | evaluate(model, s, run.roots, domain, split, view)
        rows.append(row)
        print(line_of(row), flush=True)
    about = {"settings": dataclasses.asdict(s),
             "parameters": sum(p.numel() for p in run.model.parameters()),
             "torch": torch.__version__, "device": device_name(s),
             "training_seconds": round(run.seconds, 1), "rows": rows}
    book.replace(os.path.join(folder, "report.json"), json.dumps(about, indent=1).encode())
    draw_all(run, pretrained, folder)


def draw_all(run, pretrained, folder):
    """The pictures of a run. One that fails costs nothing but itself: the report is written."""
    s = run.settings

    def samples(file):
        title = (f"Left of the gap: two true images of the caption. Right of it: three samples"
                 f" ({s.model}, guidance {s.guidance:g})")
        pictures.draw_samples(sample_columns(pretrained, run.ema, s), title, file)

    def curves(file):
        pictures.draw_curves(run.log, s, file)

    def probe(file):
        pictures.draw_probe(run.probe, s, file)

    todo = {"samples.png": samples}
    if run.log:                                # there is none after --init with no step to make
        todo["curves.png"] = curves
    if run.probe:
        todo["probe.png"] = probe
    drawn = ["report.json"]
    for name, draw in todo.items():
        try:
            draw(os.path.join(folder, name))
            drawn.append(name)
        except Exception as error:
            print(f"train.py: {name} could not be drawn ({in_one_line(error)}); report.json is "
                  "whole")
    print(f"\nthis table and the pictures are in {folder}: {', '.join(drawn)}")


def sample_columns(pretrained, finetuned, s):
    """For three kinds of captions (title, [(caption, two true images, three samples)])."""
    mixed = ["macro", "macro", "meso", "meso", "micro"]
    kinds = [(pretrained, "base", "seen", "pretrained, base domain: seen", ["macro"] * 5),
             (pretrained, "base", "held_out", "pretrained, base domain: held out", ["macro"] * 5),
             (finetuned, "target", "held_out", "fine-tuned, target domain: held out", mixed)]
    columns = []
    for stream, (model, domain, split, title, views) in enumerate(kinds, 7):
        scenes = toy_data.sample_scenes(5, machine.seeded(s, stream), domain, split, s.objects)
        granularity = torch.tensor([VIEWS.index(view) for view in views], device=s.device)
        truth, tokens = toy_data.views(scenes, granularity, s.pixels)
        # The jitter to the other side, and the other radius: always another image.
        mirrored = (toy_data.NUISANCES[0] + toy_data.NUISANCES[-1]).to(s.device) - scenes.nuisance
        others, _ = toy_data.views(scenes._replace(nuisance=mirrored), granularity, s.pixels)
        made = sample_images(model, tokens.repeat_interleave(3, 0), s, machine.seeded(s, 6))
        made = made.unflatten(0, (5, 3))
        captions = toy_data.captions(scenes, views)
        columns.append((title, list(zip(captions, zip(truth, others), made))))
    return columns
