"""Text to image, end to end: pretrain on one domain of scenes, fine-tune on views of another.

    python train.py                              # everything, at a size that suits this machine
    python train.py --model unet --seed 1        # any setting is a flag, see --help
    python train.py --resume                     # go on after a stop, as if there had been none
    torchrun --nproc_per_node=2 train.py         # two GPUs: the same batches, each takes a share
    python train.py sample --checkpoint runs/dit-0/checkpoint.pt \\
        "macro red striped circle top left on grey"

The method is draw_batch, learning_rate and Run's train_step and back_propagate. support/ holds the
rest: report.py judges a run, book.py keeps its files, machine.py knows GPUs and processes.
"""

import copy
import dataclasses
import math
import os
import sys

import support

if __name__ == "__main__":
    support.begin_program()                    # Ctrl-C may come while torch is loaded

import torch

import flow_matching as fm
import sga
import toy_data
from dit import DiT
from support import adapters, book, machine, pictures, report
from support.book import option, stop
from unet import UNet

FORMAT = "quadratic geometry of flow matching 6"


# --- Settings -------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Settings:
    """All that decides what a run computes. The defaults are the preset cpu of the DiT."""

    model: str = option("dit", "the network", choices=("dit", "unet"))
    seed: int = option(0, "of the first weights, the data and the noise", 0, 2**31)
    device: str = option("cpu", "where to compute", choices=("cpu", "cuda"))
    precision: str = option("float32", "of the network; path, target and loss are always float32",
                            choices=("float32", "bfloat16"))
    compile: int = option(0, "1: torch.compile the network for training", choices=(0, 1))
    graph: int = option(0, "1: a CUDA graph repeats the launches of a step, which a slow host "
                        "would hold up (with one GPU)", choices=(0, 1))
    init: str = option("", "a checkpoint to fine-tune, instead of pretraining")
    # The data.
    pixels: int = option(16, "height and width of an image", 8, 256)
    objects: int = option(1, "objects in a scene", choices=(1, 2))
    roots: int = option(256, "images to fine-tune on, each seen at three granularities", 1)
    smallest_object: float = option(0.0, "roots whose object has a smaller radius have no micro "
                                    "view: it would be enlarged too much", 0.0, 1.0)
    # The network.
    width: int = option(64, "numbers a token (DiT) or place of the smallest grid (U-Net) has", 8)
    depth: int = option(3, "blocks (DiT only)", 1)
    patch: int = option(2, "height and width of a patch (DiT only)", 1)
    # The training.
    arm: str = option("sga", "how to fine-tune: the method (sga), its ingredients, or a control",
                      choices=tuple(sga.ARMS))
    pretrain_views: str = option("all", "of the pretraining: whole scenes alone (macro), or all "
                                 "granularities, half of them macro", choices=("macro", "all"))
    pretrain_steps: int = option(6500, "optimizer steps on the base domain", 1)
    finetune_steps: int = option(2800, "on views of the target domain (arm big: a third)", 0)
    batch: int = option(32, "images in a step of the pretraining", 1)
    tuples: int = option(8, "tuples in a step of the fine-tuning, of up to three views each", 1)
    chunk: int = option(0, "most views in one backward pass, to save memory; 0: all of a step", 0)
    lr: float = option(4e-3, "the pretraining's learning rate, but for warm-up and decay", 0.0, 1.0)
    finetune_lr: float = option(3e-3, "the same of the fine-tuning", 0.0, 1.0)
    rank: int = option(0, "of the adapters that the fine-tuning trains in place of all weights; "
                       "0: all weights", 0, 4096)
    warmup: int = option(200, "steps in which a rising rate would reach the whole of it", 1)
    weight_decay: float = option(0.0, "of AdamW", 0.0, 1.0)
    clip: float = option(1.0, "largest norm of the gradient", 1e-12)
    ema: float = option(0.999, "decay of the averaged weights, which are evaluated", 0.0, 0.99999)
    caption_dropout: float = option(0.1, "share of captions replaced by the null caption, for "
                                    "guidance", 0.0, 1.0)
    time_mean: float = option(0.0, "noise levels: t = sigmoid(z), z ~ N(time_mean + the arm's "
                              "offset, time_std^2)", -10.0, 10.0)
    time_std: float = option(1.0, "see time_mean", 0.0, 100.0)
    time_shift: float = option(1.0, "resolution shift of t; above 1 favours noise", 1e-3, 1e3)
    # The report.
    every: int = option(400, "steps between two rows of the log, each with a checkpoint", 1)
    guidance: float = option(3.0, "scale of the guidance when sampling; 1 is off", 0.0, 100.0)
    sample_steps: int = option(8, "steps when sampling: Heun's, the last one Euler's", 1)
    eval_images: int = option(256, "images behind every figure of the report", 2)
    probe: int = option(0, "roots whose interaction matrix joins every row of the log", 0)

    def __post_init__(self):
        book.check(self)
        if self.probe > self.roots:
            stop(f"--probe must be at most --roots, {self.roots}, not {self.probe}")


# A step of either phase has 192 = 3 * 64 views, so that --compile 1 compiles for one size.
GPU = {"device": "cuda", "precision": "bfloat16", "graph": 1, "pixels": 32, "objects": 2,
       "width": 192, "depth": 4, "patch": 4, "batch": 192, "tuples": 64, "lr": 2e-3,
       "finetune_lr": 2e-3, "pretrain_steps": 10000, "finetune_steps": 600, "every": 5000}
TINY = {"width": 24, "patch": 4, "depth": 1, "roots": 4, "batch": 4, "tuples": 2, "every": 2,
        "pretrain_steps": 8, "finetune_steps": 4, "warmup": 2, "sample_steps": 2, "eval_images": 8}
UNET = {"width": 96, "pretrain_steps": 8000, "finetune_steps": 2200, "lr": 2e-3,
        "finetune_lr": 2e-3, "guidance": 2.0}
PRESETS = {("cpu", "dit"): {}, ("cpu", "unet"): UNET, ("gpu", "dit"): GPU, ("gpu", "unet"): GPU,
           ("tiny", "dit"): TINY, ("tiny", "unet"): TINY}


def build(s, step=0):
    """The network as a step of the run has it. Its first weights depend on the seed alone."""
    if s.device == "cuda" and not torch.cuda.is_available():
        stop("--device cuda was asked for, but torch finds no CUDA device here")
    torch.manual_seed(s.seed)
    words = len(toy_data.WORDS)
    try:
        if s.model == "dit":
            model = DiT(words, s.pixels, s.patch, s.width, s.depth)
        else:
            widths = (s.width // 3, 2 * s.width // 3, s.width)
            model = UNet(words, s.pixels, widths, s.width)
    except ValueError as error:
        stop(error)
    if step > s.pretrain_steps:
        adapters.add(model, s)
    return model.to(s.device)


# --- The method -----------------------------------------------------------------------------------

def phase_of(s, step):
    """The phase of optimizer step 1, 2, ... and the step's number within this phase."""
    if step <= s.pretrain_steps:
        return "pretrain", step
    return "finetune", step - s.pretrain_steps


def draw_batch(run, step, planned=None):
    """Images x0, noise e, noise levels t, tokens and loss weights a of one step, n samples each.

    Pretraining samples new scenes. Fine-tuning takes the views that the arm's plan names, or
    the `planned` ones: views (n,) and their weights (n,).
    """
    s, generator = run.settings, run.generator
    phase, number = phase_of(s, step)
    if phase == "pretrain":
        scenes = toy_data.sample_scenes(s.batch, generator, "base", "seen", s.objects)
        granularity = torch.zeros_like(scenes.background)          # (n,)  all are macro
        if s.pretrain_views == "all":
            # Of 0, 1, 2, 3 the last becomes macro too: whole scenes are the hardest to draw.
            four = torch.randint(4, (s.batch,), generator=generator, device=s.device)
            granularity = four % 3                                 # (n,)
        a = torch.full((s.batch,), 1 / s.batch, device=s.device)   # (n,)
    else:
        chosen, a = planned or run.plan[number - 1]                # (n,), (n,)
        scenes = run.roots.take(run.root[chosen])
        granularity = run.granularity[chosen]                      # (n,)
    n = len(granularity)
    x0, tokens = toy_data.views(scenes, granularity, s.pixels)     # (n, 3, H, W), (n, 12)

    # Some captions become the null caption, so that the network learns both sides of guidance.
    kept = torch.rand(n, 1, generator=generator, device=s.device) >= s.caption_dropout
    tokens = tokens * kept                                         # (n, 12)

    # SGA chooses noise levels by granularity. One control hands the same offsets out at random.
    whose = granularity                                            # (n,)
    if run.arm.mixed:
        whose = granularity[torch.randperm(n, generator=generator, device=s.device)]
    t = sga.offset_time(whose, generator, run.offsets, s.time_mean, s.time_std, s.time_shift)
    e = torch.randn(x0.shape, generator=generator, device=s.device)
    if run.arm.min_snr and phase == "finetune":
        a = a * sga.min_snr_weight(t, granularity, form=run.arm.min_snr)  # (n,)
    return x0, e, t, tokens, a


def learning_rate(run, step):
    """Of step 1, 2, ...: in each phase the lower of a line up, the warm-up, and one down to 0."""
    s = run.settings
    phase, number = phase_of(s, step)
    if phase == "pretrain":
        return s.lr * min(number / s.warmup, 1 - (number - 1) / s.pretrain_steps)
    # A step of the arm big holds the images of `join` steps, so it needs fewer steps to rise.
    rise = number * run.arm.join / s.warmup
    return s.finetune_lr * min(rise, 1 - (number - 1) / len(run.plan))


class Run:
    """What training changes and a checkpoint holds. Steps count on through both phases."""

    def __init__(self, s, step=0):
        self.settings, self.arm = s, sga.method(s.arm, s.model)
        self.model = build(s, step)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.new_optimizer()
        self.generator = machine.seeded(s, 0)
        self.step, self.seconds = 0, 0.0
        self.offsets = (0.0, 0.0, 0.0)         # of the noise levels; the arm's in the fine-tuning
        self.log, self.probe = [], []
        self.loss = torch.full((), math.nan, dtype=torch.float64, device=s.device)
        self.finite = report.Finite(s.device)
        self.products = None                   # of the views' gradients, for the arm quiet
        self.choose_the_views()
        self.plan_the_finetuning()
        self.last = s.pretrain_steps + len(self.plan)
        self.use(self.model)

    def choose_the_views(self):
        """The roots, and their views: each is a root at a granularity."""
        s = self.settings
        self.roots = toy_data.sample_scenes(s.roots, machine.seeded(s, 1), "target", "seen",
                                            s.objects)
        self.root, self.granularity = sga.all_views(self.roots.nuisance[:, 2], s.smallest_object)

    def plan_the_finetuning(self):
        """Which views each step sees, and with which weights."""
        s = self.settings
        steps = sga.plan(self.root.cpu(), self.granularity.cpu(), self.arm, s.tuples,
                         s.finetune_steps, 10 * s.seed + 1, self.products)
        self.plan = [(views.to(s.device), a.to(s.device)) for views, a in steps]

    def use(self, network):
        """Trains through this network, which holds the weights of self.model."""
        self.network = network
        self.velocity = machine.in_precision(network, self.settings)
        self.graphs = machine.Graphs() if machine.may_repeat(self.settings) else None

    def new_optimizer(self):
        s = self.settings
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, s.lr, (0.9, 0.99),
                                           weight_decay=s.weight_decay, fused=True)

    def begin_finetuning(self):
        """From the averaged weights, with a new optimizer. Doing it twice changes nothing."""
        self.model.load_state_dict(self.ema.state_dict())
        adapters.add(self.model, self.settings)                    # none unless --rank is given
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.new_optimizer()
        self.offsets = self.arm.offsets
        if self.arm.meet == "conflict":
            self.products = report.products_of_views(self)
            self.plan_the_finetuning()

    def train_step(self):
        """One optimizer step; returns the norm of the gradient before clipping."""
        s = self.settings
        self.step += 1
        if self.graphs:
            t, a, loss, norm = self.graphs.back_propagate(self)    # the same, as one launch
        else:
            t, a, loss, norm = self.back_propagate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self, self.step)
        self.optimizer.step()

        # The averaged weights forget a phase's first ones soon; the loss is a mean of ~50 steps.
        _, number = phase_of(s, self.step)
        machine.average(self.ema, self.model, decay=min(s.ema, number / (number + 10)))
        self.loss = torch.where(self.loss.isnan(), loss, 0.98 * self.loss + 0.02 * loss)
        self.finite.watch(self.step, t, a, loss, norm)
        return norm

    def back_propagate(self, step, planned=None):
        """Leaves the clipped gradient of a step in the weights: Algorithm 2, all but the update.

        Returns the noise levels t, the weights a, the loss, and the norm before clipping.
        """
        s = self.settings
        x0, e, t, tokens, a = draw_batch(self, step, planned)
        x0, e, t, tokens, a = machine.my_share(x0, e, t, tokens, a)

        def losses(x0, e, t, tokens):
            return fm.loss(self.velocity, x0, e, t, tokens)        # (n,)

        def no_exchange():
            return machine.without_exchange(self.network)

        self.optimizer.zero_grad()
        sub_batches = machine.in_chunks(x0, e, t, tokens, a, s.chunk or len(a))
        with machine.tensor_cores():
            loss = sga.deferred_backward(losses, sub_batches, no_exchange)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), s.clip)
        return t, a, loss, norm

    def row_is_due(self):
        """Whether this step has a row of the log: every few, and the last one of each phase."""
        s = self.settings
        return self.step % s.every == 0 or self.step in (s.pretrain_steps, self.last)

    def save(self, file):
        book.save_run(self, file, FORMAT)

    def restore(self, content):
        book.restore_run(self, content)


# --- Training -------------------------------------------------------------------------------------

def train(run, folder):
    """Both phases, or what is left of them; every few steps a row of the log and a checkpoint."""
    s = run.settings
    first = machine.rank() == 0
    machine.check_shares(run)
    run.use(machine.compiled(machine.together(run.model), s))
    if first:
        recorder = report.Recorder(run)
    with machine.finishing_the_step() as interrupts:
        while run.step < run.last:
            if run.step == s.pretrain_steps:
                run.begin_finetuning()
                if s.rank:                     # the network has other weights to train now
                    run.use(machine.compiled(machine.together(run.model), s))
            if run.arm.measured and run.step >= s.pretrain_steps and run.row_is_due():
                run.offsets = report.measured_offsets(run)
            norm = run.train_step()
            if run.row_is_due():
                run.finite.check()
                run.loss = machine.mean_of_all(run.loss)
                if first:
                    recorder.add_row(run, phase_of(s, run.step)[0], norm)
                    report.save_all(run, folder)
            elif first:
                recorder.pass_over(run, phase_of(s, run.step)[0])
            if interrupts:
                run.finite.check()
                run.save(os.path.join(folder, "checkpoint.pt"))
                stop(f"interrupted: step {run.step} is saved, go on with --resume")


# --- The command line -----------------------------------------------------------------------------

def new_run(s, folder):
    """A Run from the start or from the weights of --init, in a folder that holds nothing yet."""
    book.check_unused(folder)
    run = Run(machine.suited(s))
    if s.init:
        book.load_weights(s.init, run.ema, s, FORMAT)
        run.step = s.pretrain_steps
    os.makedirs(folder, exist_ok=True)
    return run


def resumed_run(asked, folder):
    """The Run of the folder's checkpoint. What was asked for by name must be what it has."""
    s, content = book.load(os.path.join(folder, "checkpoint.pt"), Settings, FORMAT)
    run = Run(book.agreed(s, asked, folder), content["step"])
    run.restore(content)
    return run


def main_train(arguments):
    s, asked, folder, resuming = book.parse(arguments, Settings, PRESETS, __doc__)
    machine.full_precision()
    machine.join_the_others(s.device)
    if machine.rank() > 0:                     # the others read what process 0 has begun
        machine.wait_for_the_others()
        return train(resumed_run(asked, folder), folder)

    run = None if resuming else new_run(s, folder)
    with book.owned(folder):
        if resuming:
            run = resumed_run(asked, folder)
        else:
            book.check_unused(folder)          # once more, now that nobody else can use it
            report.save_all(run, folder)
        file = os.path.join(folder, "pretrained.pt")
        if run.step >= run.settings.pretrain_steps:                # refused now, not at the end
            book.load_weights(file, build(run.settings), run.settings, FORMAT)
        machine.wait_for_the_others()
        report.announce(run, folder)
        train(run, folder)
        # A kill may have come between the last checkpoint and its rows: no later row mends that.
        book.write_rows(run.log, run.probe, report.COLUMNS, folder)
        pretrained = book.load_weights(file, build(run.settings), run.settings, FORMAT)
        report.report(run, pretrained, folder)


def main_sample(arguments):
    captions, tokens, checkpoint, out, changes = book.parse_sample(arguments)
    picture = pictures.file_of(out)
    machine.full_precision()
    s, content = book.load(checkpoint, Settings, FORMAT)
    s = dataclasses.replace(s, **changes)
    report.say_what_was_never_trained(captions, s, content["step"])
    model = book.load_weights(checkpoint, build(s, content["step"]), s, FORMAT)
    report.draw_captions(model, s, captions, tokens, picture)


def main(arguments):
    with machine.leaving_the_others(), book.one_sentence():
        if arguments[:1] == ["sample"]:
            main_sample(arguments[1:])
        else:
            main_train(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
