"""The program on a GPU, without one: every tensor lies where it should, and no step makes the host
wait; every operator that the program uses has an implementation for CUDA.
"""

import contextlib
import dataclasses
import inspect
import os
import signal
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dit
import flow_matching as fm
import ntk
import sga
import toy_data
import train
from pretended_gpu import Mismatch, pretended_gpu, tensors_in
from support import machine, pictures, report

PIXELS = 8
CAPTION = "macro red plain circle left of blue plain circle on white"


def forget_tables():
    """Tables are copied to a device once: one of the CPU must not be taken for one of the GPU.

    The reader's limit is a number, which takes seconds and may stay.
    """
    for function in vars(toy_data).values():
        if hasattr(function, "cache_clear") and function is not toy_data.largest_real_residual:
            function.cache_clear()


@contextlib.contextmanager
def on_gpu():
    """Within, there is a GPU, on which nothing lies yet, and nothing of it is left behind."""
    forget_tables()
    with pretended_gpu() as gpu:
        yield gpu
    forget_tables()


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """Also where a Mismatch ends a course."""
    yield
    forget_tables()


def settings(**more):
    sizes = {"device": "cuda", "precision": "bfloat16", "pixels": PIXELS, "objects": 2,
             "pretrain_steps": 2, "eval_images": 4, "sample_steps": 1}
    return train.Settings(**train.TINY | sizes | more)


# --- What the pretended GPU notices ---------------------------------------------------------------

# Of x on the CPU and y on the GPU, both with the entries 0, 1, 2.
REFUSED = {
    "a sum of both": lambda x, y: x + y,
    "a list of both": lambda x, y: torch.cat([x, y]),
    "an index on the GPU": lambda x, y: x[y],
    "an index of index_select": lambda x, y: y.index_select(0, x),
    "numpy": lambda x, y: y.numpy(),
    "a generator of the CPU": lambda x, y: torch.randn_like(y.float(), generator=torch.Generator()),
    "a generator of the GPU": lambda x, y: torch.rand(3, generator=torch.Generator("cuda")),
    "a part of a view": lambda x, y: y[1:].square() * x[1:],
    "under vmap": lambda x, y: torch.func.vmap(torch.mul, (None, 0))(x, y),
}
WAITING = {
    "a number is read": lambda x, y: y[0].item(),
    "a number decides": lambda x, y: bool(y[0] > 1),
    "a list": lambda x, y: y.tolist(),
    "a copy to the GPU": lambda x, y: x.to("cuda"),
    "a copy like another": lambda x, y: x.to(y),
    "a copy to the CPU": lambda x, y: y.to("cpu"),
    "a copy in place": lambda x, y: y.copy_(x),
    "a new tensor of a list": lambda x, y: torch.tensor([1], device=y.device),
    "an index on the CPU": lambda x, y: y[x],
    "an index that is a list": lambda x, y: y[[0, 2]],
    "an index that is a mask": lambda x, y: y[y > 0],
    "a size that hangs on numbers": lambda x, y: y.nonzero(),
    "repeats that are a tensor": lambda x, y: y.repeat_interleave(y),
}
FREE = {
    "a sum with a number": lambda x, y: y + 1 + torch.tensor(1.0),
    "new tensors of one number": lambda x, y: torch.zeros(3, device=y.device) + torch.ones_like(y),
    "an index on the GPU": lambda x, y: y[y],
    "a slice": lambda x, y: y[1:],
    "a tensor that is there": lambda x, y: torch.as_tensor(y, device="cuda").to("cuda"),
    "a choice of numbers": lambda x, y: torch.where(y > 0, 1.0, 2.0),
    "random numbers": lambda x, y: torch.rand(3, generator=torch.Generator("cuda"), device="cuda"),
    "repeats that are a number": lambda x, y: y.repeat_interleave(2),
    "on the CPU": lambda x, y: x[x > 0].tolist(),
    "the shape and the device": lambda x, y: (y.shape, y.device),
}


def on_both(call):
    """What a call gives for x on the CPU and y on the GPU, and what the host waited for."""
    with on_gpu() as gpu:
        x = torch.arange(3)
        y = torch.arange(3, device="cuda")
        return call(x, y), gpu.waits


@pytest.mark.parametrize("call", REFUSED)
def test_what_cuda_refuses_is_refused(call):
    with pytest.raises(Mismatch):
        on_both(REFUSED[call])


@pytest.mark.parametrize("call", WAITING)
def test_what_waits_is_noted(call):
    _, waits = on_both(WAITING[call])
    assert len(waits) == 1


@pytest.mark.parametrize("call", FREE)
def test_what_does_not_wait_is_not_noted(call):
    _, waits = on_both(FREE[call])
    assert waits == []


def test_nothing_of_the_pretended_gpu_is_left_behind():
    before = torch.cuda.is_available, torch.Generator, torch.autocast, torch.load
    with on_gpu():
        assert torch.cuda.is_available() and torch.zeros(1, device="cuda").is_cuda
    assert before == (torch.cuda.is_available, torch.Generator, torch.autocast, torch.load)
    assert not torch.zeros(1).is_cuda


# --- The whole course -----------------------------------------------------------------------------

class Operators(TorchDispatchMode):
    """Notes the name of every operator that is called, in the forward and in the backward pass."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **kwargs or {})


def blank(figure, file, **_):
    """In place of Figure.savefig, which takes seconds."""
    Path(file).write_bytes(b"a picture")


def nothing(*_):
    pass


@contextlib.contextmanager
def interrupted_after(step):
    """Within, Ctrl-C follows a step."""
    train_step = train.Run.train_step

    def planted(run):
        norm = train_step(run)
        if run.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return norm

    with patch.object(train.Run, "train_step", planted):
        yield


@pytest.fixture(scope="module", params=["dit", "unet"])
def course(request, tmp_path_factory):
    """The folder of a run on the GPU that was stopped and resumed, and all operators' names.

    The U-Net's run has no probe and no report: what they ask of a network is M, once, and what
    the training and the samples ask of it.
    """
    model = request.param
    folder = tmp_path_factory.mktemp("runs") / model
    flags = ["--preset", "tiny", "--model", model, "--device", "cuda", "--precision",
             "bfloat16", "--graph", 1, "--pixels", PIXELS, "--objects", 2, "--pretrain_steps", 2,
             "--finetune_steps", 2, "--eval_images", 2, "--sample_steps", 1,
             "--probe", 1 if model == "dit" else 0, "--out", folder]
    run = [str(flag) for flag in flags]
    sample = ["sample", "--checkpoint", str(folder / "checkpoint.pt")]
    operators = Operators()
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch("matplotlib.figure.Figure.savefig", blank))
        if model == "dit":
            toy_data.largest_real_residual.cache_clear()
        else:
            stack.enter_context(patch.object(report, "report", nothing))
        stack.enter_context(on_gpu())
        stack.enter_context(operators)
        with interrupted_after(3), pytest.raises(SystemExit, match="interrupted"):
            train.main(run)
        train.main([*run, "--resume"])
        train.main([*sample, "--out", str(folder / "there.png"), CAPTION])
        if model == "unet":
            fast_route_of_a_unet()
    return folder, operators.names


def test_the_whole_course_keeps_each_tensor_on_its_device(course):
    """The training in bfloat16, the probe, the report, the pictures, a resume and samples."""
    folder, _ = course
    names = {file.name for file in folder.iterdir()}
    assert {"checkpoint.pt", "pretrained.pt", "log.csv", "there.png"} <= names
    if folder.name == "dit":
        assert {"report.json", "probe.jsonl", "samples.png", "curves.png", "probe.png"} <= names


def test_a_checkpoint_of_the_gpu_is_drawn_on_a_cpu(course):
    folder, _ = course
    with patch("matplotlib.figure.Figure.savefig", blank):
        train.main(["sample", "--checkpoint", str(folder / "checkpoint.pt"), "--device", "cpu",
                    "--out", str(folder / "here.png"), CAPTION])
    assert (folder / "here.png").exists()


KERNELS = ("CUDA", "CompositeImplicitAutograd", "CompositeExplicitAutograd",
           "CompositeExplicitAutogradNonFunctional")


def without_kernel(names):
    """The operators that a GPU does not know: neither of their own nor made of others."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return [name for name in names if not any(has_kernel(name, key) for key in KERNELS)]


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this torch was built without CUDA")
def test_every_operator_of_the_course_has_a_kernel_for_cuda(course):
    _, names = course
    assert len(names) > 100
    assert without_kernel(names) == []
    only_on_a_cpu = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert without_kernel([*names, only_on_a_cpu]) == [only_on_a_cpu]


# --- Steps ----------------------------------------------------------------------------------------

def steps(**more):
    """What the host waits for in the second step of the pretraining and of the fine-tuning.

    In the first one tables are copied to the GPU, and the optimizer makes its state.
    """
    with on_gpu() as gpu:
        run = train.Run(settings(finetune_steps=6, **more))
        waits = []
        for _ in range(2):
            run.train_step()
            gpu.waits.clear()
            run.train_step()
            waits += gpu.waits
            run.begin_finetuning()
        assert run.loss.isfinite()
    return waits


EVERY_ARM = [("dit", arm) for arm in sga.ARMS]


@pytest.mark.parametrize("model, arm", [*EVERY_ARM, ("unet", "sga"), ("unet", "baseline")])
def test_no_step_waits_for_the_gpu_or_copies_to_it(model, arm):
    assert steps(model=model, arm=arm) == []


@pytest.mark.parametrize("model", ["dit", "unet"])
def test_no_step_that_is_launched_as_a_graph_waits(model):
    """Neither while it is recorded nor when it is launched: the second step of a phase is both."""
    assert steps(model=model, graph=1) == []


def test_no_step_in_parts_waits():
    assert steps(chunk=3, precision="float32", objects=1) == []


def test_on_an_old_gpu_a_run_is_in_float32_and_not_compiled(capsys):
    with on_gpu(), patch.object(torch.cuda, "get_device_capability", lambda *_: (7, 5)):
        s = machine.suited(settings(compile=1))
    assert (s.precision, s.compile) == ("float32", 0)
    [said] = capsys.readouterr().out.splitlines()
    assert "float32" in said and "8.0" in said
    with on_gpu():
        assert machine.suited(settings(compile=1)) == settings(compile=1)
    assert capsys.readouterr().out == ""


def test_a_measured_step_stays_on_the_gpu():
    with on_gpu():
        run = train.Run(settings(arm="measured"))
        run.begin_finetuning()
        run.offsets = report.measured_offsets(run)
        run.train_step()
        run.finite.check()
    assert len(run.offsets) == 3


# --- Every function of the concept modules --------------------------------------------------------

class Batch:
    """A network on the GPU, and three samples with all that the modules' functions ask for."""

    def __init__(self, model="dit"):
        self.generator = torch.Generator("cuda").manual_seed(0)
        self.model = train.build(settings(model=model))
        for weight in self.model.parameters():
            torch.nn.init.normal_(weight, std=0.1)                 # away from a head of 0
        scenes = toy_data.sample_scenes(3, self.generator, objects=2)
        self.granularity = torch.tensor([0, 1, 2], device="cuda")
        self.x0, self.tokens = toy_data.views(scenes, self.granularity, PIXELS)
        self.e = torch.randn(self.x0.shape, generator=self.generator, device="cuda")
        self.t = torch.tensor([0.2, 0.5, 0.8], device="cuda")
        self.x_t = fm.path(self.x0, self.e, self.t)


def calls_of_flow_matching(b):
    points, groups = b.x0[:2], torch.tensor([0, 1], device="cuda")
    times = torch.linspace(1, 0, 3)
    velocity = fm.guided(b.model, b.tokens, 2.0)
    _, u_g = fm.group_velocities(b.x_t, b.t, points, groups)
    return {
        "path": b.x_t,
        "target": fm.target(b.x0, b.e),
        "residual": fm.residual(b.model, b.x0, b.e, b.t, b.tokens),
        "loss": fm.loss(b.model, b.x0, b.e, b.t, b.tokens),
        "guided": velocity(b.x_t, b.t),
        "euler": fm.euler(velocity, b.e, times),
        "heun": fm.heun(velocity, b.e, times),
        "sample": fm.sample(b.model, b.tokens, b.e, 2, 2.0),
        "posterior": fm.posterior(b.x_t, b.t, points),
        "exact_velocity": fm.exact_velocity(b.x_t, b.t, points, torch.ones(2, device="cuda")),
        "loss_floor": fm.loss_floor(b.x0, b.e, b.t, points),
        "group_velocities": u_g,
        "data_interaction_matrix": fm.data_interaction_matrix(b.x0, u_g),
    }


def calls_of_sga(b):
    def losses(*batch):
        return fm.loss(b.model, *batch)

    a = torch.ones(3, device="cuda") / 3
    sub_batches = [((b.x0, b.e, b.t, b.tokens), a)]
    M = torch.eye(3, device="cuda")
    optimizer = torch.optim.SGD(b.model.parameters(), 0.1)
    tuples = [torch.tensor([0, 1]).to("cuda"), torch.tensor([2]).to("cuda")]
    image, boxes = b.x0[0], {"meso": (0, 0, 6, 6)}
    views = sga.decompose(image, boxes, "a caption", 4, smallest=1)
    _, meso, _ = views[1]
    return {
        "all_views": sga.all_views(torch.ones(2, device="cuda")),
        "offset_time": sga.offset_time(b.granularity, b.generator),
        "min_snr_weight": sga.min_snr_weight(b.t, b.granularity),
        "deferred_backward": sga.deferred_backward(losses, sub_batches),
        "measured_offsets": sga.measured_offsets(M, b.granularity, b.t),
        "decompose": meso,
        "one_sga_step": sga.one_sga_step(b.model, optimizer, fm.loss, b.x0, b.tokens,
                                         b.granularity, tuples, b.generator),
    }


def calls_of_ntk(b):
    f, params = ntk.of_module(b.model)
    inputs = (b.x_t, b.t, b.tokens)
    r = fm.residual(b.model, b.x0, b.e, b.t, b.tokens).detach()
    M = ntk.interaction_matrix(f, params, inputs, r)
    fast = ntk.fast_interaction_matrix(b.model, inputs, r)
    layer = torch.nn.Linear(4, 2).to("cuda")
    few = (torch.ones(3, 4, device="cuda"),)
    g, small = ntk.of_module(layer)
    K = ntk.ntk_blocks(g, small, few)
    labels = torch.stack([b.granularity, b.granularity // 2], 1)
    outputs = torch.ones(3, 2, device="cuda")
    return {
        "one_linear_layer": ntk.one_linear_layer(*few, outputs),
        "of_module": f(params, *(z[0] for z in inputs)),
        "interaction_matrix": M,
        "fast_interaction_matrix": fast,
        "per_sample_gradients": ntk.per_sample_gradients(g, small, few, outputs),
        "ntk_vector_product": ntk.ntk_vector_product(g, small, few, outputs),
        "ntk_blocks": K,
        "ntk_trace": ntk.ntk_trace(g, small, few),
        "fast_ntk_blocks": ntk.fast_ntk_blocks(layer, few),
        "loss_velocity": ntk.loss_velocity(M),
        "sample_velocities": ntk.sample_velocities(M),
        "predicted_change": ntk.predicted_change(M, 0.1),
        "cosines": ntk.cosines(M),
        "conflict_share": ntk.conflict_share(M),
        "pairs_by_kind": ntk.pairs_by_kind(M, labels, ("view", "pair")),
        "frozen_residuals": ntk.frozen_residuals(K, outputs, 0.5),
        "kernel_drift": ntk.kernel_drift(K, K + 1),
        "sign_agreement": ntk.sign_agreement(M, r),
        "step_noise": ntk.step_noise(M, M),
    }


# What works on lists and numbers of the host: who meets in which step, and the arms.
ON_THE_HOST = {"root_tuples", "traded", "in_conflict", "tuple_weights", "plan", "whole_scenes",
               "method"}


def public_functions(module):
    """The names of a module's functions, up to its demo."""
    demo = inspect.getsource(module).split("# --- The demo")[0].count("\n")
    found = set()
    for name, function in vars(module).items():
        ours = inspect.isfunction(function) and function.__module__ == module.__name__
        if ours and not name.startswith("_") and function.__code__.co_firstlineno <= demo:
            found.add(name)
    return found


@pytest.mark.parametrize("module, calls", [
    (fm, calls_of_flow_matching), (sga, calls_of_sga), (ntk, calls_of_ntk)])
def test_every_function_takes_tensors_of_the_gpu_and_answers_there(module, calls):
    with on_gpu():
        answers = calls(Batch())
        for name, answer in answers.items():
            assert all(x.is_cuda for x in tensors_in([answer])), name
    assert public_functions(module) - ON_THE_HOST == answers.keys()


def fast_route_of_a_unet():
    b = Batch("unet")
    r = fm.residual(b.model, b.x0, b.e, b.t, b.tokens).detach()
    M = ntk.fast_interaction_matrix(b.model, (b.x_t, b.t, b.tokens), r)
    assert M.is_cuda


# --- Planted mistakes are noticed -----------------------------------------------------------------

def resumed_step(folder):
    """A step of a run that goes on from a checkpoint."""
    with on_gpu():
        run = train.Run(settings())
        run.train_step()
        run.save(str(folder / "checkpoint.pt"))
        run = train.resumed_run({}, folder)
        run.train_step()


def judged(folder):
    """A part of the report, two rows of the probe, and a picture."""
    with patch("matplotlib.figure.Figure.savefig", blank), on_gpu():
        run = train.Run(settings(probe=1))
        s = run.settings
        report.evaluate(run.ema, s, run.roots, "base", "seen", "macro")
        batch = report.probe_batch(s, run.roots, 1)
        first = report.probe_row(run.model, batch, [])
        report.probe_row(run.model, batch, [first])
        pictures.draw_captions([CAPTION], batch[0][0][None], str(folder / "drawn.png"))


def test_the_courses_of_the_planted_mistakes_are_good_without_them(tmp_path):
    resumed_step(tmp_path)
    judged(tmp_path)


def noise_without_device(put):
    """A missing device= in the data of a step."""
    draw_batch = train.draw_batch

    def planted(*arguments):
        x0, e, t, tokens, a = draw_batch(*arguments)
        return x0, torch.randn(x0.shape), t, tokens, a

    put(train, "draw_batch", planted)


def waves_without_device(put):
    """A missing device= in a network."""
    def planted(position, width):
        k = torch.arange(width // 2)
        angle = position[..., None] * torch.exp(-k / width)
        return torch.cat([angle.sin(), angle.cos()], -1)

    put(dit, "sinusoid", planted)


def population_without_device(put):
    """A missing device= in what a run is judged by."""
    def planted(scenes):
        each = torch.arange(len(scenes.background)).repeat_interleave(18)
        nuisance = toy_data.NUISANCES.repeat(len(scenes.background), 1)
        return scenes.take(each)._replace(nuisance=nuisance)

    put(toy_data, "population", planted)


def sampling_without_device(put):
    def planted(model, tokens, s, generator):
        noise = torch.randn(len(tokens), 3, s.pixels, s.pixels)
        return fm.sample(machine.in_precision(model, s), tokens, noise, 1, 1.0)

    put(report, "sample_images", planted)


def tables_stay(put):
    put(toy_data, "constant", lambda table, device: torch.as_tensor(table))


def palette_stays(put):
    """A table of the CPU with an index of the GPU."""
    put(toy_data, "palette", lambda table, device: torch.tensor(list(table.values())))


def network_stays(put):
    build = train.build
    put(train, "build", lambda s, step: build(dataclasses.replace(s, device="cpu"), step))


def planted_in_run(put, change):
    """After a Run is made, something of it is changed."""
    init = train.Run.__init__

    def planted(run, s):
        init(run, s)
        change(run)

    put(train.Run, "__init__", planted)


def weights_of_the_plan_stay(put):
    def change(run):
        run.plan = [(views, a.cpu()) for views, a in run.plan]
    planted_in_run(put, change)


def roots_stay(put):
    def change(run):
        run.roots = run.roots._replace(objects=run.roots.objects.cpu())
    planted_in_run(put, change)


def watched_numbers_stay(put):
    def change(run):
        run.finite = report.Finite("cpu")
    planted_in_run(put, change)


def generator_stays(put):
    put(machine, "seeded", lambda s, stream: torch.Generator().manual_seed(stream))


def generator_goes_too_far(put):
    """Random numbers of the GPU for a tensor of the CPU."""
    def planted(s, stream):
        generator = torch.Generator("cuda")
        torch.randperm(3, generator=generator)
        return generator

    put(machine, "seeded", planted)


def tokens_stay(put):
    caption_tokens = toy_data.caption_tokens
    put(toy_data, "caption_tokens", lambda *arguments: caption_tokens(*arguments).cpu())


def optimizer_stays(put):
    """Its state is left behind on the CPU by a resume."""
    restore = train.Run.restore

    def planted(run, content):
        restore(run, content)
        for state in run.optimizer.state.values():
            state["exp_avg"] = state["exp_avg"].cpu()

    put(train.Run, "restore", planted)


def kernel_stays(put):
    """The first row of the probe was read from a file, and is compared as it is."""
    kernel_drift = ntk.kernel_drift
    put(ntk, "kernel_drift", lambda K, first: kernel_drift(K, torch.tensor(first.tolist())))


def picture_of_the_gpu(put):
    put(pictures, "show", lambda axis, images: axis.imshow(images[0].numpy()))


def in_a_step(folder):
    steps()


MISMATCHES = [
    (noise_without_device, in_a_step), (waves_without_device, in_a_step),
    (tables_stay, in_a_step), (palette_stays, in_a_step), (network_stays, in_a_step),
    (weights_of_the_plan_stay, in_a_step), (roots_stay, in_a_step),
    (watched_numbers_stay, in_a_step), (generator_stays, in_a_step),
    (generator_goes_too_far, in_a_step), (tokens_stay, in_a_step),
    (optimizer_stays, resumed_step), (population_without_device, judged),
    (sampling_without_device, judged), (kernel_stays, judged), (picture_of_the_gpu, judged)]


@pytest.mark.parametrize("plant, course", MISMATCHES)
def test_a_tensor_on_the_wrong_side_is_noticed(tmp_path, monkeypatch, plant, course):
    plant(monkeypatch.setattr)
    with pytest.raises(Mismatch):
        course(tmp_path)


def number_is_read(put):
    clip = torch.nn.utils.clip_grad_norm_

    def planted(*arguments):
        norm = clip(*arguments)
        return norm if norm.item() > 0 else norm

    put(torch.nn.utils, "clip_grad_norm_", planted)


def captions_by_text(put):
    """Tables in place of texts are what keeps a step from waiting."""
    def planted(scenes, granularity):
        rows = [[toy_data.WORDS.index("macro")] + [0] * 11 for _ in granularity.tolist()]
        return torch.tensor(rows, device=granularity.device)

    put(toy_data, "caption_tokens", planted)


def tables_are_copied(put):
    """In every step: both tables of numbers, and tables that are tensors already."""
    def planted(table, device):
        return torch.as_tensor(table).to(device)

    put(toy_data, "constant", planted)


def tensor_tables_are_copied(put):
    constant = toy_data.constant

    def planted(table, device):
        is_tensor = isinstance(table, torch.Tensor)
        return table.to(device) if is_tensor else constant(table, device)

    put(toy_data, "constant", planted)


def views_of_the_plan_stay(put):
    """A tensor of the GPU may be indexed by one of the CPU, but waits for the copy."""
    def change(run):
        run.plan = [(views.cpu(), a) for views, a in run.plan]
    planted_in_run(put, change)


def an_index_is_a_list(put):
    def planted(*batch):
        losses = loss(*batch)
        order = list(range(len(losses)))
        return losses[order]

    loss = fm.loss
    put(fm, "loss", planted)


def an_index_is_a_mask(put):
    """How many entries it picks, only the GPU knows."""
    def planted(*batch):
        losses = loss(*batch)
        return losses[losses > 0]

    loss = fm.loss
    put(fm, "loss", planted)


WAITS = [number_is_read, captions_by_text, tables_are_copied, tensor_tables_are_copied,
         views_of_the_plan_stay, an_index_is_a_list, an_index_is_a_mask]


@pytest.mark.parametrize("plant", WAITS)
def test_a_step_that_waits_is_noticed(monkeypatch, plant):
    plant(monkeypatch.setattr)
    assert steps() != []
