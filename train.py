"""Text to image, end to end: pretrain on whole scenes of one domain, fine-tune on views of another, report.

    python train.py                                        # everything, at a size that suits this machine
    python train.py --model unet --seed 1                  # any setting is a flag, see --help
    python train.py --resume                               # go on after a stop, as if there had been none
    torchrun --nproc_per_node=2 train.py                   # on two GPUs: the same batches, each GPU takes a share of the views
    python train.py sample --checkpoint runs/dit-0/checkpoint.pt "macro red striped circle top left on white"

The method is draw_batch, train_step and learning_rate; the rest keeps books. Everything that a run makes lies in its folder: log.csv, checkpoint.pt, pretrained.pt, report.json, and two pictures.
"""

import argparse
import contextlib
import copy
import csv
import dataclasses
import itertools
import json
import math
import os
import signal
import sys
import time

import torch
import torch.distributed as dist

import flow_matching as fm
import ntk
import sga
import toy_data
from dit import DiT
from toy_data import GRANULARITIES
from unet import UNet


class Stop(Exception):
    """Ends the program with one sentence for its user."""


# --- The arms of the study: each differs from the baseline in what it names --------------------------------------

ARMS = {
    "sga": {"tuples": "root", "scale": True},                      # the method: root tuples, and the scale that suits the network
    "whole": {"views": "macro"},                                   # whole scenes alone, as many images
    "baseline": {},                                                # all views, shuffled, each of the same weight
    "big": {"join": 3},                                            # the baseline in a third of the steps, of thrice the size
    "stratified": {"tuples": "granularity"},                       # tuples of one view of each granularity, of any roots
    "tuple": {"tuples": "root"},                                   # root tuples, scaled by 1/K_g
    "tuple_max": {"tuples": "root", "scaling": "view"},            # root tuples, scaled by 1/K_max
    "random": {"tuples": "any"},                                   # tuples of any views
    "offsets": {"offsets": sga.OFFSETS},                           # noise levels by granularity
    "flipped": {"offsets": tuple(-mu for mu in sga.OFFSETS)},      # with the opposite sign
    "global": {"offsets": sga.OFFSETS, "mixed": True},             # with the same noise levels in all, whatever the granularity
    "min_snr": {"weights": True},                                  # weights by noise level and granularity, as in the authors' code
    "measured": {"measured": True},                                # beyond the paper: offsets from the interaction matrix, at every row of the log
    "lean": {"offsets": (-0.25, -0.25, -0.25)},                    # the control of measured: about its mean offset, alike for every granularity
}


def parts(s):
    """What the arm of the settings changes. Scale is offsets for the DiT and Min-SNR weights for the U-Net, as in the paper."""
    arm = {"views": "", "tuples": "", "scaling": "root", "offsets": (0.0, 0.0, 0.0), "mixed": False, "measured": False, "weights": False, "join": 1} | ARMS[s.arm]
    if arm.get("scale"):
        arm |= {"offsets": sga.OFFSETS} if s.model == "dit" else {"weights": True}
    return arm


# --- Settings ----------------------------------------------------------------------------------------------------

def option(default, help, low=None, high=math.inf, choices=None):
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that decides what a run computes. The defaults are the preset `cpu` of the DiT; PRESETS lists what others change."""

    model: str = option("dit", "the network", choices=("dit", "unet"))
    seed: int = option(0, "of the first weights, the data and the noise", 0, 2**31)
    device: str = option("cpu", "where to compute", choices=("cpu", "cuda"))
    precision: str = option("float32", "of the network; path, target and loss are always float32", choices=("float32", "bfloat16"))
    compile: int = option(0, "1: torch.compile the network for training; costs a minute at first", choices=(0, 1))
    init: str = option("", "a checkpoint to fine-tune, instead of pretraining")
    # the data
    pixels: int = option(24, "height and width of an image", 8, 256)
    objects: int = option(1, "objects in a scene", choices=(1, 2))
    roots: int = option(32, "images of the target domain to fine-tune on, each seen at three granularities", 1)
    # the network
    width: int = option(96, "channels of a token (DiT) or of the coarsest grid (U-Net: a multiple of 24)", 8)
    depth: int = option(4, "blocks (DiT only)", 1)
    patch: int = option(4, "height and width of a patch (DiT only)", 1)
    # the training
    arm: str = option("sga", "how to fine-tune: the method (sga), its parts, or a control", choices=tuple(ARMS))
    pretrain_steps: int = option(10000, "optimizer steps on whole scenes of the base domain", 1)
    finetune_steps: int = option(600, "optimizer steps on views of the target domain (the arm big takes a third, with thrice the views)", 0)
    batch: int = option(16, "images in a step of the pretraining", 1)
    tuples: int = option(8, "tuples in a step of the fine-tuning, of up to three views each", 1)
    smallest_object: float = option(0.0, "roots with an object of a smaller radius have no micro view: it would be enlarged too much", 0.0, 1.0)
    lr: float = option(3e-3, "peak learning rate of the pretraining; it falls linearly to 0", 0.0, 1.0)
    finetune_lr: float = option(1e-3, "peak learning rate of the fine-tuning", 0.0, 1.0)
    warmup: int = option(100, "steps in which the learning rate rises", 1)
    weight_decay: float = option(0.0, "of AdamW", 0.0, 1.0)
    chunk: int = option(0, "most views in one backward pass; 0: all of a step. The step stays the same, its memory falls", 0)
    clip: float = option(1.0, "largest norm of the gradient", 1e-12)
    ema: float = option(0.999, "decay of the averaged weights, which are the ones that are evaluated", 0.0, 0.99999)
    caption_dropout: float = option(0.1, "share of captions replaced by the null caption, for guidance", 0.0, 1.0)
    time_mean: float = option(0.5, "noise levels: t = sigmoid(z), z ~ N(time_mean, time_std^2)", -10.0, 10.0)
    time_std: float = option(1.0, "see time_mean", 0.0, 100.0)
    time_shift: float = option(1.0, "resolution shift of t; above 1 favours noise", 1e-3, 1e3)
    # the report
    every: int = option(250, "steps between two rows of the log, each with a validation and a checkpoint", 1)
    guidance: float = option(2.0, "scale of the guidance when sampling; 1 is off", 0.0, 100.0)
    sample_steps: int = option(12, "steps of Heun's method when sampling", 1)
    eval_images: int = option(256, "images behind every figure of the report", 2)
    probe: int = option(0, "roots of the probe batch: its interaction matrix joins every row of the log (0 is off)", 0)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, rule = getattr(self, field.name), field.metadata
            if rule["choices"] and value not in rule["choices"]:
                raise Stop(f"--{field.name} must be one of {', '.join(map(str, rule['choices']))}, not {value}")
            if rule["low"] is not None and not (rule["low"] <= value <= rule["high"] and math.isfinite(value)):
                raise Stop(f"--{field.name} must be from {rule['low']} to {rule['high']}, not {value}")


PRESETS = {
    ("cpu", "dit"): {},
    ("cpu", "unet"): {"pretrain_steps": 4500, "batch": 32, "lr": 2e-3},
    ("gpu", "dit"): {"device": "cuda", "precision": "bfloat16", "compile": 1, "pixels": 32, "objects": 2, "width": 192, "batch": 256, "tuples": 64, "lr": 2e-3},
    ("tiny", "dit"): {"width": 24, "depth": 1, "roots": 4, "pretrain_steps": 8, "finetune_steps": 4, "batch": 4, "tuples": 2, "warmup": 2,
                      "every": 2, "sample_steps": 2, "eval_images": 8},
}
PRESETS |= {(size, "unet"): PRESETS[size, "dit"] for size in ("gpu", "tiny")}


# --- The method --------------------------------------------------------------------------------------------------

def build(s):
    """The network of the settings, with weights that depend on nothing but its seed. Raises Stop if it cannot be had."""
    if s.device == "cuda" and not torch.cuda.is_available():
        raise Stop("--device cuda was asked for, but torch finds no CUDA device here")
    torch.manual_seed(s.seed)
    words = len(toy_data.WORDS)
    try:
        if s.model == "dit":
            return DiT(words, s.pixels, s.patch, s.width, s.depth).to(s.device)
        return UNet(words, s.pixels, (s.width // 3, 2 * s.width // 3, s.width), s.width).to(s.device)
    except ValueError as error:
        raise Stop(str(error))


def velocity(model, s):
    """The model as a function of (x, t, tokens) that computes in the precision of the settings."""
    def compute(x, t, tokens):
        with torch.autocast(s.device, torch.bfloat16, enabled=s.precision == "bfloat16"):
            return model(x, t, tokens)
    return compute


def draw(scenes, granularity, s):
    """Images (n, 3, pixels, pixels) and tokens (n, 12) of n scenes, each at its granularity, (n,) indices."""
    return toy_data.render(scenes, toy_data.view_boxes(scenes, granularity), s.pixels), toy_data.caption_tokens(scenes, granularity)


def all_of(view, scenes):
    """(n,) the view's index, for each of the n scenes."""
    return torch.full_like(scenes.background, GRANULARITIES.index(view))


def draw_roots(s):
    """The scenes of the target domain to fine-tune on: the same for every run with this seed."""
    return toy_data.sample_scenes(s.roots, seeded(s, 1), "target", "seen", s.objects)


def seeded(s, stream):
    """A generator of its own for each use, so that no use disturbs another."""
    return torch.Generator(s.device).manual_seed(10 * s.seed + stream)


@dataclasses.dataclass
class Plan:
    """All that fine-tuning will see: views, each a root at a granularity, and for each step its views and their weights in the loss."""

    roots: toy_data.Scenes
    root: torch.Tensor                                             # (V,)
    granularity: torch.Tensor                                      # (V,)
    steps: list                                                    # of ((n,), (n,))

    def images(self, steps):
        """How many images the first steps have."""
        return sum(len(views) for views, _ in self.steps[:steps])


def make_plan(s):
    """The Plan of a run: steps of whole tuples, in which every arm has as many images as any other, since only the views trade places."""
    arm, roots = parts(s), draw_roots(s)
    root, granularity = torch.arange(s.roots).repeat_interleave(3), torch.arange(3).repeat(s.roots)
    kept = (granularity < 2) | (roots.nuisance[:, 2].cpu() >= s.smallest_object)[root]
    root, granularity = root[kept], granularity[kept]
    trade = {"root": None, "granularity": granularity}.get(arm["tuples"], torch.zeros_like(root))
    stream = sga.root_tuples(root, torch.Generator().manual_seed(10 * s.seed + 1), trade)
    steps = []
    for _ in range(s.finetune_steps):
        tuples = list(itertools.islice(stream, s.tuples))
        views = torch.cat(tuples)
        if arm["views"] == "macro":
            views = torch.searchsorted(root, root[views])          # the first view of the same root
        steps.append((views, sga.tuple_weights([len(k) for k in tuples], arm["scaling"]) if arm["tuples"] else torch.ones(len(views)) / len(views)))
    joined = [steps[k:k + arm["join"]] for k in range(0, len(steps), arm["join"])]
    steps = [(torch.cat([v for v, _ in some]), torch.cat([a for _, a in some]) / len(some)) for some in joined]
    return Plan(roots, *(z.to(s.device) for z in (root, granularity)), [tuple(z.to(s.device) for z in step) for step in steps])


def updates(s):
    """The optimizer steps of the fine-tuning: one for each of the plan's."""
    return math.ceil(s.finetune_steps / parts(s)["join"])


def draw_batch(s, generator, plan=None, step=0, offsets=(0.0, 0.0, 0.0)):
    """x0, tokens, t, e and weights a of one step: new whole scenes to pretrain on, or with a plan the views of its step."""
    arm = parts(s)
    if plan is None:
        scenes = toy_data.sample_scenes(s.batch, generator, "base", "seen", s.objects)
        granularity, a = torch.zeros_like(scenes.background), torch.full((s.batch,), 1 / s.batch, device=s.device)   # all macro
    else:
        views, a = plan.steps[step]
        scenes, granularity = plan.roots.take(plan.root[views]), plan.granularity[views]
    n = len(granularity)
    x0, tokens = draw(scenes, granularity, s)
    kept = torch.rand(n, 1, generator=generator, device=s.device) >= s.caption_dropout
    whose = granularity[torch.randperm(n, generator=generator, device=s.device)] if arm["mixed"] else granularity
    t = sga.offset_time(whose, generator, offsets, s.time_mean, s.time_std, s.time_shift)
    if plan is not None and arm["weights"]:
        a = a * sga.min_snr_weight(t, granularity)
    return x0, tokens * kept, t, torch.randn(x0.shape, generator=generator, device=s.device), a


def learning_rate(s, phase, step):
    """The rate of the phase's step 1, 2, ...: up over the warm-up, then linearly down to 0 after its last step."""
    if phase == "pretrain":
        return s.lr * min(step / s.warmup, 1 - (step - 1) / s.pretrain_steps, 1)
    return s.finetune_lr * min(step * parts(s)["join"] / s.warmup, 1 - (step - 1) / updates(s), 1)


torch.backends.cudnn.allow_tf32 = False                            # torch's own default is True; see tensor_cores


def processes():
    """(this process's number, how many there are): (0, 1) unless torchrun started several."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def tensor_cores():
    """Float32 products and convolutions in TF32 within, where a GPU has it: faster, with 10 bits. What is measured keeps all 23."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False


class Run:
    """What training changes and a checkpoint holds. Steps count through both phases."""

    def __init__(self, s):
        self.settings, self.step, self.seconds, self.offsets = s, 0, 0.0, (0.0, 0.0, 0.0)
        self.model = build(s)
        self.loss = torch.full((), math.nan, dtype=torch.float64, device=s.device)  # of training, a running mean
        self.broken = torch.zeros((), dtype=torch.long, device=s.device)   # the first step whose gradient was not finite, if any
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.generator = seeded(s, 0)
        self.network, self.compute = self.model, velocity(self.model, s)
        self.new_optimizer()

    def prepare(self):
        """Makes training parallel and fast, once the state is what it should be. The weights stay those of self.model."""
        if processes()[1] > 1:
            self.network = torch.nn.parallel.DistributedDataParallel(self.model)
        self.compute = velocity(torch.compile(self.network) if self.settings.compile else self.network, self.settings)

    def new_optimizer(self):
        s = self.settings
        self.optimizer = torch.optim.AdamW(self.model.parameters(), s.lr, (0.9, 0.99), weight_decay=s.weight_decay, fused=True)

    def phase(self):
        return "pretrain" if self.step < self.settings.pretrain_steps else "finetune"

    def begin_finetuning(self):
        """From the averaged weights, with a new optimizer and the arm's offsets. Doing it twice changes nothing."""
        self.model.load_state_dict(self.ema.state_dict())
        self.new_optimizer()
        self.offsets = parts(self.settings)["offsets"]
        self.measure_offsets()

    def measure_offsets(self):
        """In the arm `measured`, and not in the pretraining: the offsets that the interaction matrix of a few roots' views asks for."""
        s = self.settings
        if parts(s)["measured"] and self.phase() == "finetune":
            inputs, u, labels = probe_batch(dataclasses.replace(s, probe=min(6, s.roots)))
            M = probed_matrices(self.model, inputs, u)[0]
            self.offsets = tuple(sga.measured_offsets(M, labels[:, 1], inputs[1]).tolist())

    def train_step(self, plan):
        """One optimizer step; returns the norm of the gradient before clipping. Nothing in it makes a GPU wait for its host.

        Of several processes each draws the whole batch, with the same random numbers, and takes its share: together they make the step of one.
        """
        s, phase, step = self.settings, self.phase(), self.step + 1
        within = step if phase == "pretrain" else step - s.pretrain_steps
        first, count = processes()
        *views, a = (z[first::count] for z in draw_batch(s, self.generator, plan if phase == "finetune" else None, within - 1, self.offsets))
        a = count * a                                              # several processes average their gradients
        sub_batches = [(part[:-1], part[-1]) for part in zip(*(z.split(s.chunk or len(z)) for z in (*views, a)))]
        self.optimizer.zero_grad()
        with tensor_cores():
            loss = sga.deferred_backward(lambda *views: fm.loss(self.compute, *views), sub_batches, getattr(self.network, "no_sync", contextlib.nullcontext))
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), s.clip)
        self.broken = torch.where((self.broken == 0) & ~norm.isfinite(), step, self.broken)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(s, phase, within)
        self.optimizer.step()
        decay = min(s.ema, within / (within + 10))                 # a phase's first weights do not stay in the mean
        torch._foreach_lerp_(list(self.ema.parameters()), [weight.detach() for weight in self.model.parameters()], 1 - decay)
        self.loss = torch.where(self.loss.isnan(), loss, 0.98 * self.loss + 0.02 * loss)
        self.step = step
        return norm

    def check(self):
        """The running mean of the loss as a number, over all processes. Raises Stop if a step since the last check was not finite."""
        if self.broken:
            raise Stop(f"the loss of step {self.broken} or its gradient is not finite; a lower --lr may help")
        if processes()[1] > 1:
            dist.all_reduce(self.loss)
            self.loss /= processes()[1]
        return self.loss.item()

    def save(self, file):
        """Replaces the file in one move: whatever happens, it is the old checkpoint or the new one, whole."""
        content = {"format": FORMAT, "settings": dataclasses.asdict(self.settings), "step": self.step, "seconds": self.seconds,
                   "loss": self.loss.item(), "offsets": self.offsets, "model": self.model.state_dict(), "ema": self.ema.state_dict(),
                   "optimizer": self.optimizer.state_dict(), "rng": self.generator.get_state()}
        with open(file + ".tmp", "wb") as stream:
            torch.save(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(file + ".tmp", file)

    def restore(self, content):
        self.step, self.seconds, self.offsets = (content[name] for name in ("step", "seconds", "offsets"))
        self.loss.fill_(content["loss"])
        self.model.load_state_dict(content["model"])
        self.ema.load_state_dict(content["ema"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.generator.set_state(content["rng"])


FORMAT = "quadratic geometry of flow matching 2"
CONTENT = {"format", "settings", "step", "seconds", "loss", "offsets", "model", "ema", "optimizer", "rng"}


def load(file):
    """The settings and the content of a checkpoint. Raises Stop if it is missing, damaged or not one of train.py."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise Stop(f"the checkpoint {file} cannot be read: {error.strerror}")
    except Exception:                                              # torch.load raises many types for a damaged file
        raise Stop(f"{file} is not a checkpoint, or only a part of one")
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.keys() != CONTENT:
        raise Stop(f"{file} is not a checkpoint of this train.py")
    try:
        return Settings(**content["settings"]), content
    except TypeError:
        raise Stop(f"{file} is a checkpoint of another version of train.py, with other settings")


def load_weights(file, model, s):
    """Puts the averaged weights of a checkpoint into the model. Raises Stop if it is of another architecture."""
    theirs, content = load(file)
    for name in ("model", "pixels", "width", "depth", "patch"):
        if getattr(theirs, name) != getattr(s, name):
            raise Stop(f"{file} has --{name} {getattr(theirs, name)}, not {getattr(s, name)}")
    try:
        model.load_state_dict(content["ema"])
    except RuntimeError:
        raise Stop(f"the weights in {file} do not fit this network: another vocabulary or another version of its code")
    return model


# --- Training ----------------------------------------------------------------------------------------------------

COLUMNS = ["step", "phase", "images", "lr", "loss", "grad_norm", "images_per_s",
           *(f"{name}_{view}" for name in ("val_loss", "val_error", "val_floor") for view in GRANULARITIES)]


def train(run, folder):
    """Both phases, or what is left of them; a row of the log, a validation and a checkpoint every few steps."""
    s, plan = run.settings, make_plan(run.settings)
    roots = plan.roots
    run.prepare()
    validation = {"pretrain": {"macro": validation_set("base", "seen", "macro", s, roots)},
                  "finetune": {view: validation_set("target", "seen", view, s, roots) for view in GRANULARITIES}}
    last, interrupted = s.pretrain_steps + updates(s), []
    images = lambda step: min(step, s.pretrain_steps) * s.batch + plan.images(max(step - s.pretrain_steps, 0))
    due = lambda step: step % s.every == 0 or step in (s.pretrain_steps, last)
    first, count = processes()
    if count == 1:
        previous = signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))   # finish the step, then save
    probing = probe_batch(s) if s.probe and first == 0 else None
    if probing and run.step in (0, s.pretrain_steps) and not read_probe(folder):
        append_probe(run, probing, folder)
    if first == 0:
        print(f"fine-tuning: arm {s.arm}, {updates(s)} optimizer steps, {plan.images(None):,} images in all", flush=True)
    clock, clock_step = time.time(), run.step
    try:
        while run.step < last:
            if run.step == s.pretrain_steps:
                run.begin_finetuning()
            elif due(run.step):
                run.measure_offsets()
            phase = run.phase()
            norm = run.train_step(plan)
            if due(run.step):
                loss = run.check()
                speed = (images(run.step) - images(clock_step)) / (time.time() - clock)
                run.seconds += time.time() - clock
                if first == 0:
                    row = {"step": run.step, "phase": phase, "images": images(run.step), "lr": run.optimizer.param_groups[0]["lr"],
                           "loss": loss, "grad_norm": norm.item(), "images_per_s": speed}
                    for view, held in validation[phase].items():
                        row |= {f"val_{name}_{view}": value for name, value in validate(run.ema, held, s).items()}
                    append_row(folder, row)
                    if probing:
                        append_probe(run, probing, folder)
                    minutes, seconds = divmod(int((images(last) - images(run.step)) / speed), 60)
                    print(f"{phase} step {run.step}/{last}  loss {loss:.4f}  {speed:.0f} images/s  {minutes}:{seconds:02} left", flush=True)
                    if run.step == s.pretrain_steps:
                        run.save(os.path.join(folder, "pretrained.pt"))
                    run.save(os.path.join(folder, "checkpoint.pt"))
                clock, clock_step = time.time(), run.step
            if interrupted:
                run.check()
                run.save(os.path.join(folder, "checkpoint.pt"))
                raise Stop(f"interrupted: step {run.step} is saved, go on with --resume")
    finally:
        if count == 1:
            signal.signal(signal.SIGINT, previous)


def append_row(folder, row):
    with open(os.path.join(folder, "log.csv"), "a", newline="") as stream:
        csv.DictWriter(stream, COLUMNS).writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})


def read_log(folder):
    with open(os.path.join(folder, "log.csv"), newline="") as stream:
        return list(csv.DictReader(stream))


# --- The probe: the geometry while it evolves (Eq. 12-17) ----------------------------------------------------------

PROBE_LEVELS = (0.2, 0.5, 0.8)                                     # t


def probe_batch(s):
    """The inputs and target of the first roots' views at three noise levels each, and what each sample shares: (N, 3) root, view, level."""
    roots = draw_roots(s)
    labels = torch.cartesian_prod(torch.arange(s.probe), torch.arange(3), torch.arange(len(PROBE_LEVELS))).to(s.device)   # (N, 3)
    x0, tokens = draw(roots.take(labels[:, 0]), labels[:, 1], s)
    e = torch.randn(x0.shape, generator=seeded(s, 3), device=s.device)
    t = torch.tensor(PROBE_LEVELS, device=s.device)[labels[:, 2]]
    return (fm.path(x0, e, t), t, tokens), fm.target(x0, e), labels


def probed_matrices(model, inputs, u):
    """M of the residuals, the same of the targets u (the kernel seen by fixed vectors), and the residuals r."""
    with torch.no_grad():
        r = torch.cat([model(*part) for part in zip(*(z.split(64) for z in inputs))]) - u
    return *(ntk.fast_interaction_matrix(model, inputs, vectors).detach() for vectors in (r, u)), r


def geometry(M, r, labels):
    """Eq. 13, 17, and for each kind of pair (by what two samples share) the share in conflict and the mean cosine."""
    trace, cross = ntk.loss_velocity(M)
    i, j = torch.triu_indices(len(M), len(M), 1, device=M.device)
    same, found = labels[i] == labels[j], {}                       # (pairs, 3)
    for kind in itertools.product((True, False), repeat=3):
        of_kind = (same == torch.tensor(kind, device=M.device)).all(1)
        if of_kind.any():
            name = " ".join(word for word, shared in zip(("root", "view", "level"), kind) if shared) or "nothing"
            found[name] = {"conflict": (M[i, j][of_kind] < 0).float().mean().item(), "cosine": ntk.cosines(M)[i, j][of_kind].mean().item()}
    return {"trace": trace.item(), "cross": cross.item(), "conflict": (M[i, j] < 0).float().mean().item(),
            "sign_agreement": ntk.sign_agreement(M, r).item(), "pairs": found}


def append_probe(run, probing, folder):
    """One line of probe.jsonl: M, its summary, and the drift of K seen by fixed vectors, the targets: u_i^T K_ij u_j.

    Of the live weights, in float32, with no random number and no gradient of the run's touched.
    """
    inputs, u, labels = probing
    M, seen, r = probed_matrices(run.model, inputs, u)
    before = read_probe(folder)
    first = torch.tensor(before[0]["kernel"], device=M.device) if before else seen
    row = {"step": run.step, "offsets": run.offsets, "drift": ntk.kernel_drift(seen, first).item()} | geometry(M, r, labels)
    row |= {"M": M.tolist()} | ({} if before else {"kernel": seen.tolist()})
    with open(os.path.join(folder, "probe.jsonl"), "a") as stream:
        stream.write(json.dumps(row) + "\n")


def read_probe(folder):
    """The rows so far, without a last one that was only begun."""
    try:
        with open(os.path.join(folder, "probe.jsonl")) as stream:
            return [json.loads(line) for line in stream if line.endswith("\n")]
    except FileNotFoundError:
        return []


# --- The report --------------------------------------------------------------------------------------------------

def test_scenes(domain, split, s, roots, stream):
    """Scenes to test on. On the target domain "seen" are the captions of the roots, with the nuisance drawn anew."""
    scenes = toy_data.sample_scenes(s.eval_images, seeded(s, stream), domain, split, s.objects)
    if (domain, split) == ("target", "seen"):
        scenes = roots.take(torch.arange(s.eval_images, device=s.device) % s.roots)._replace(nuisance=scenes.nuisance)
    return scenes


def validation_set(domain, split, view, s, roots):
    """x0, e, t, tokens and the exact velocity u* at fixed noise levels, evenly spread: t = 1/2n, 3/2n, ..., 1 - 1/2n."""
    scenes = test_scenes(domain, split, s, roots, 2)
    granularity = all_of(view, scenes)
    x0, tokens = draw(scenes, granularity, s)
    e = torch.randn(x0.shape, generator=seeded(s, 3), device=s.device)
    t = (torch.arange(s.eval_images, device=s.device) + 0.5) / s.eval_images
    everything, _ = draw(toy_data.population(scenes), granularity.repeat_interleave(len(toy_data.NUISANCES)), s)
    u_star = fm.exact_velocity(fm.path(x0, e, t), t, everything.unflatten(0, (s.eval_images, -1)))
    return x0, e, t, tokens, u_star


@torch.no_grad()
def validate(model, held, s):
    """The mean loss |v - u|^2 / D, the error |v - u*|^2 / D of the exact velocity, and the loss floor |u - u*|^2 / D (Eq. 5)."""
    x0, e, t, tokens, u_star = held
    v = torch.cat([velocity(model, s)(*part).float() for part in zip(*(z.split(256) for z in (fm.path(x0, e, t), t, tokens)))])
    gap = lambda a, b: (a - b).square().mean().item()
    return {"loss": gap(v, fm.target(x0, e)), "error": gap(v, u_star), "floor": gap(fm.target(x0, e), u_star)}


@torch.no_grad()
def sample(model, tokens, s, generator):
    """(n, 3, pixels, pixels) images of n captions, from noise along the guided velocity by Heun's method."""
    v = fm.guided(velocity(model, s), tokens, s.guidance)
    times = torch.linspace(1, 0, s.sample_steps + 1, device=s.device)
    noise = torch.randn(len(tokens), 3, s.pixels, s.pixels, generator=generator, device=s.device)
    return fm.heun(lambda x, t: v(x, t).float(), noise, times)


def wilson(share, n):
    """The 95% Wilson interval of a share of n."""
    z = 1.96
    centre, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return [max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))]


def evaluate(model, domain, split, view, s, roots):
    """One row of the report's table: the validation figures, and what the reader finds in samples and in real images."""
    scenes = test_scenes(domain, split, s, roots, 4)
    x0, tokens = draw(scenes, all_of(view, scenes), s)
    found = toy_data.accuracies(sample(model, tokens, s, seeded(s, 5)), scenes, view)
    ceiling = toy_data.accuracies(x0, scenes, view)["joint"].float().mean().item()
    row = {"domain": domain, "split": split, "view": view} | validate(model, validation_set(domain, split, view, s, roots), s)
    row |= {name: found[name].float().mean().item() for name in ("layout", "shape_colour", "texture", "joint")}
    valid = found["residual"] <= toy_data.largest_real_residual(view, s.pixels, s.objects)
    return row | {"interval": wilson(row["joint"], s.eval_images), "ceiling": ceiling, "valid": valid.float().mean().item()}


def sample_columns(pretrained, finetuned, s):
    """For three kinds of captions (title, [(caption, two true images, three samples)]), five captions each."""
    kinds = [(pretrained, "base", "seen", "pretrained, base domain: seen combinations", ["macro"] * 5),
             (pretrained, "base", "held_out", "pretrained, base domain: held-out combinations", ["macro"] * 5),
             (finetuned, "target", "held_out", "fine-tuned, target domain: held-out combinations", ["macro", "macro", "meso", "meso", "micro"])]
    for stream, (model, domain, split, title, views) in enumerate(kinds, 7):
        scenes = toy_data.sample_scenes(5, seeded(s, stream), domain, split, s.objects)
        granularity = torch.tensor([GRANULARITIES.index(view) for view in views], device=s.device)
        truth, tokens = draw(scenes, granularity, s)
        others, _ = draw(scenes._replace(nuisance=scenes.nuisance.flip(0)), granularity, s)
        drawn = sample(model, tokens.repeat_interleave(3, 0), s, seeded(s, 6)).unflatten(0, (5, 3))
        yield title, list(zip(toy_data.captions(scenes, views), zip(truth, others), drawn))


def report(run, folder):
    """Evaluates the pretrained and the fine-tuned model, prints the table, and writes report.json and the pictures."""
    s, roots = run.settings, draw_roots(run.settings)
    pretrained = load_weights(os.path.join(folder, "pretrained.pt"), copy.deepcopy(run.ema), s)
    tasks = [("pretrained", pretrained, "base", split, "macro") for split in ("seen", "held_out")]
    tasks += [("fine-tuned", run.ema, "target", split, view) for split in ("seen", "held_out") for view in GRANULARITIES]
    print(f"\n{'model':10} {'captions':16} {'view':5} {'val loss':>8} {'floor':>6} {'|v-u*|^2':>8} {'layout':>6} {'shape':>6} {'textur':>6}"
          f" {'joint':>6} {'95% interval':>13} {'ceiling':>7} {'valid':>6}")
    rows = []
    for name, model, domain, split, view in tasks:
        row = {"model": name} | evaluate(model, domain, split, view, s, roots)
        rows.append(row)
        low, high = row["interval"]
        print(f"{name:10} {domain + ' ' + split:16} {view:5} {row['loss']:8.4f} {row['floor']:6.4f} {row['error']:8.4f} {row['layout']:6.1%}"
              f" {row['shape_colour']:6.1%} {row['texture']:6.1%} {row['joint']:6.1%} {low:6.1%}-{high:6.1%} {row['ceiling']:7.1%} {row['valid']:6.1%}", flush=True)
    about = {"settings": dataclasses.asdict(s), "parameters": sum(p.numel() for p in run.model.parameters()), "torch": torch.__version__,
             "device": torch.cuda.get_device_name() if s.device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
             "training_seconds": round(run.seconds, 1), "rows": rows}
    with open(os.path.join(folder, "report.json"), "w") as stream:
        json.dump(about, stream, indent=1)
    from results import pictures
    pictures.draw_samples(sample_columns(pretrained, run.ema, s), "Left of the gap: two true images of the caption. Right of it: three samples"
                          f" ({s.model}, guidance {s.guidance:g})", os.path.join(folder, "samples.png"))
    pictures.draw_curves(read_log(folder), s, os.path.join(folder, "curves.png"))
    if s.probe:
        pictures.draw_probe(read_probe(folder), s, os.path.join(folder, "probe.png"))


# --- The command line --------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Stop(f"{message} (python train.py --help lists what is allowed)")


def parse_settings(arguments):
    """The flags given, the settings that they and the preset make, the output folder, and whether to resume."""
    parser = Parser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--preset", default="auto", choices=("auto", "cpu", "gpu", "tiny"), help="auto (default): gpu where CUDA is, else cpu")
    parser.add_argument("--out", default="", help="folder of the run (default runs/MODEL-SEED)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    for field in dataclasses.fields(Settings):
        others = [f"{preset} {model}: {values[field.name]}" for (preset, model), values in PRESETS.items()
                  if preset != "tiny" and values.get(field.name, field.default) != field.default]
        parser.add_argument("--" + field.name, type=field.type, default=argparse.SUPPRESS, metavar=field.type.__name__.upper(),
                            help=f"{field.metadata['help']} (default {field.default!r}{'; '.join(['', *others])})")
    given = vars(parser.parse_args(arguments))
    preset, out, resume = given.pop("preset"), given.pop("out"), given.pop("resume")
    if preset == "auto":
        preset = "gpu" if given.get("device", "cuda") == "cuda" and torch.cuda.is_available() else "cpu"
    model = given.get("model", "dit")
    s = Settings(**PRESETS.get((preset, model), {}) | given)
    return given, s, out or os.path.join("runs", f"{s.model}-{s.seed}"), resume


def start(s, folder):
    """A new Run in a folder that holds nothing yet."""
    if os.path.exists(folder) and (not os.path.isdir(folder) or set(os.listdir(folder)) - {"checkpoint.pt.tmp"}):
        raise Stop(f"{folder} exists and is not empty: add --resume to go on with its run, or name another --out")
    run = Run(s)
    if s.init:
        load_weights(s.init, run.ema, s)
        run.step = s.pretrain_steps
    os.makedirs(folder, exist_ok=True)
    if s.init:
        run.save(os.path.join(folder, "pretrained.pt"))
    run.save(os.path.join(folder, "checkpoint.pt"))
    return run


def resume(given, folder):
    """The Run of the folder's checkpoint, with the log cut back to its step. Raises Stop if a flag contradicts it."""
    s, content = load(os.path.join(folder, "checkpoint.pt"))
    for name, value in given.items():
        if getattr(s, name) != value:
            raise Stop(f"the run in {folder} has --{name} {getattr(s, name)}, not {value}")
    run = Run(s)
    run.restore(content)
    return run


def cut_log(folder, step):
    """Drops what the log and the probe hold after the step: it will be written again. Atomic, like a checkpoint."""
    file = os.path.join(folder, "log.csv")
    rows = [row for row in read_log(folder) if int(row["step"]) <= step] if os.path.exists(file) else []
    with open(file + ".tmp", "w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(file + ".tmp", file)
    file = os.path.join(folder, "probe.jsonl")
    if os.path.exists(file):
        rows = [row for row in read_probe(folder) if row["step"] <= step]
        with open(file + ".tmp", "w") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rows)
        os.replace(file + ".tmp", file)


def main_train(arguments):
    given, s, folder, resuming = parse_settings(arguments)
    if s.probe > s.roots:
        raise Stop(f"--probe must be at most --roots, {s.roots}, not {s.probe}")
    if "RANK" in os.environ and not dist.is_initialized():         # one of the processes of torchrun
        if s.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if s.device == "cuda" else "gloo")
    if processes()[0] > 0:                                         # only the first writes: the others read what it has begun
        dist.barrier()
        run = resume(given, folder)
        return train(run, folder)
    run = resume(given, folder) if resuming else start(s, folder)
    cut_log(folder, run.step)
    if processes()[1] > 1:
        dist.barrier()
    s = run.settings
    size = sum(p.numel() for p in run.model.parameters())
    print(f"{s.model} with {size:,} parameters on {s.device}, {s.pixels} px, from step {run.step}: {folder}", flush=True)
    train(run, folder)
    report(run, folder)


def main_sample(arguments):
    parser = Parser(prog="train.py sample", description="Draw what captions say.", allow_abbrev=False)
    parser.add_argument("captions", nargs="+", help='such as "macro red striped circle top left on white"')
    parser.add_argument("--checkpoint", required=True, help="checkpoint.pt or pretrained.pt of a run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"), help="default: %(default)s")
    parser.add_argument("--model", choices=("dit", "unet"), help="refuse a checkpoint of another architecture (default: take any)")
    parser.add_argument("--guidance", type=float, help="default: that of the checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    parser.add_argument("--out", default="drawn.png", help="the picture (default drawn.png)")
    a = parser.parse_args(arguments)
    try:
        tokens = toy_data.tokenize(a.captions)
    except ValueError as error:
        raise Stop(str(error))
    wanted = {"device": a.device, "seed": a.seed, "guidance": a.guidance, "model": a.model}
    wanted |= {"precision": "float32"} if a.device == "cpu" else {}        # bfloat16 is very slow on most CPUs
    s = dataclasses.replace(load(a.checkpoint)[0], **{name: value for name, value in wanted.items() if value is not None})
    model = load_weights(a.checkpoint, build(s), s)
    images = sample(model, tokens.repeat_interleave(4, 0).to(s.device), s, seeded(s, 0)).unflatten(0, (-1, 4))
    import matplotlib.pyplot as plt
    from results.pictures import show
    figure, axes = plt.subplots(len(images), 1, figsize=(8, 2.4 * len(images)), squeeze=False, constrained_layout=True)
    for axis, four, caption in zip(axes[:, 0], images, a.captions):
        show(axis, four)
        axis.set_title(caption)
    figure.savefig(a.out, dpi=110)
    print(f"four samples of each caption are in {a.out}")


def main(arguments):
    try:
        main_sample(arguments[1:]) if arguments[:1] == ["sample"] else main_train(arguments)
    except Stop as stop:
        return f"train.py: {stop}"
    except KeyboardInterrupt:
        return "train.py: interrupted; what was saved is whole, go on with --resume"
    except OSError as error:
        return f"train.py: {error.filename or 'a file'} cannot be read or written: {error.strerror}"
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error):
            return "train.py: out of memory; lower --batch, --eval_images or --width"
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    import matplotlib
    matplotlib.use("Agg")
    sys.exit(main(sys.argv[1:]))
