"""A run of train.py survives whatever stops it, refuses what is wrong in one sentence, and reports what it measured."""

import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ntk
import train

ROOT = Path(__file__).parent.parent
CAPTION = "macro red striped circle top left on white"


def program(*arguments):
    """The command line of train.py in a process of its own, with one thread."""
    return dict(args=[sys.executable, str(ROOT / "train.py"), *map(str, arguments)], env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def tiny(folder, *more):
    return ["--preset", "tiny", "--device", "cpu", "--out", str(folder), *map(str, more)]


def tensors(content, prefix=""):
    """Every leaf of a checkpoint by its path."""
    if isinstance(content, (dict, list)):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from tensors(value, f"{prefix}/{key}")
    else:
        yield prefix, content


def same(a, b):
    """Whether two checkpoints hold the same, to the bit; the seconds that they took aside."""
    a, b = (dict(tensors(torch.load(file, weights_only=True))) for file in (a, b))
    equal = lambda x, y: torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
    return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a if k != "/seconds")


def rows(folder):
    with open(folder / "log.csv") as stream:
        return [{k: v for k, v in row.items() if k != "images_per_s"} for row in csv.DictReader(stream)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a tiny run that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main(tiny(folder)) is None
    return folder


# --- survival ---

def test_killed_in_either_phase_and_resumed_it_ends_bit_identical(tmp_path):
    flags = ["--model", "unet", "--pretrain_steps", 40, "--finetune_steps", 20, "--every", 5]
    whole = subprocess.Popen(**program(*tiny(tmp_path / "whole", *flags)))
    killed, resume = tmp_path / "killed", []
    for step in ("20/", "50/"):                                            # once in the pretraining, once in the fine-tuning
        run = subprocess.Popen(**program(*tiny(killed, *flags, *resume)))
        for line in run.stdout:
            if f"step {step}" in line:
                run.send_signal(signal.SIGKILL)
                break
        assert run.wait() == -signal.SIGKILL
        resume = ["--resume"]
    assert subprocess.run(**program("--out", killed, "--resume")).returncode == 0
    assert "fine-tuned" in whole.communicate()[0] and whole.returncode == 0
    assert same(tmp_path / "whole/checkpoint.pt", killed / "checkpoint.pt")
    assert same(tmp_path / "whole/pretrained.pt", killed / "pretrained.pt")
    assert rows(tmp_path / "whole") == rows(killed)
    assert json.loads((tmp_path / "whole/report.json").read_text())["rows"] == json.loads((killed / "report.json").read_text())["rows"]


@pytest.mark.parametrize("step", [3, 8, 9])                                # between rows, at the end of the first phase, after it
def test_control_c_saves_and_resuming_goes_on(tmp_path, monkeypatch, finished, step):
    original = train.Run.train_step

    def interrupted(run, roots):
        norm = original(run, roots)
        if run.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return norm

    monkeypatch.setattr(train.Run, "train_step", interrupted)
    assert train.main(tiny(tmp_path / "run")) == f"train.py: interrupted: step {step} is saved, go on with --resume"
    monkeypatch.undo()
    assert train.load(tmp_path / "run/checkpoint.pt")[1]["step"] == step
    assert train.main(tiny(tmp_path / "run", "--resume")) is None
    assert same(tmp_path / "run/checkpoint.pt", finished / "checkpoint.pt") and rows(tmp_path / "run") == rows(finished)


@pytest.mark.parametrize("forgotten", ["generator", "optimizer", "ema"])
def test_a_resume_that_forgets_something_is_noticed(tmp_path, monkeypatch, finished, forgotten):
    """The twin: whatever restore leaves out, the end is another one."""
    folder = tmp_path / "run"
    original = train.Run.train_step

    def stopped(run, roots):
        if run.step == 4:
            raise train.Stop("here")
        return original(run, roots)

    monkeypatch.setattr(train.Run, "train_step", stopped)
    train.main(tiny(folder))
    monkeypatch.setattr(train.Run, "train_step", original)
    restore = train.Run.restore

    def forgetful(run, content):
        restore(run, content)
        if forgotten == "generator":
            run.generator = train.seeded(run.settings, 0)
        elif forgotten == "optimizer":
            run.new_optimizer()
        else:
            run.ema = train.build(run.settings).requires_grad_(False)

    monkeypatch.setattr(train.Run, "restore", forgetful)
    assert train.main(tiny(folder, "--resume")) is None
    assert not same(folder / "checkpoint.pt", finished / "checkpoint.pt")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_with_the_step_and_keeps_the_checkpoint(tmp_path, monkeypatch, bad):
    original, calls = train.fm.loss, []
    def loss(*arguments):
        calls.append(1)
        return original(*arguments) * (bad if len(calls) == 6 else 1)
    monkeypatch.setattr(train.fm, "loss", loss)
    message = train.main(tiny(tmp_path / "run"))
    assert message.startswith("train.py: the loss of step 6 or its gradient is not finite") and "--lr" in message
    content = train.load(tmp_path / "run/checkpoint.pt")[1]
    assert content["step"] == 4 and all(value.isfinite().all() for value in content["model"].values())
    monkeypatch.undo()
    assert train.main(tiny(tmp_path / "run", "--resume")) is None          # and it is good to go on from


def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch, finished):
    file = tmp_path / "checkpoint.pt"
    run = train.Run(train.load(finished / "checkpoint.pt")[0])
    run.save(str(file))
    before = file.read_bytes()
    def full_disk(content, stream):
        stream.write(b"half of it")
        raise OSError(28, "No space left on device", str(file))
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError):
        run.save(str(file))
    assert file.read_bytes() == before


def test_out_of_memory_names_what_to_lower(tmp_path, monkeypatch):
    def loss(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(train.fm, "loss", loss)
    assert "lower --batch" in train.main(tiny(tmp_path / "run"))
    monkeypatch.setattr(train.fm, "loss", lambda *_: torch.empty(10**15))
    assert "lower --batch" in train.main(tiny(tmp_path / "run2"))


# --- refusals: one sentence, and nothing overwritten ---

def refused(arguments, *words):
    message = train.main([str(a) for a in arguments])
    assert isinstance(message, str) and message.startswith("train.py: ") and "\n" not in message, message
    for word in words:
        assert word in message
    return message


@pytest.mark.parametrize("flags, words", [
    (["--colour", "red"], ["--colour"]), (["--batch", "many"], ["--batch", "many"]), (["--batch", "0"], ["--batch", "from 1", "0"]),
    (["--batch", "1.5"], ["--batch"]), (["--lr", "nan"], ["--lr", "nan"]), (["--lr", "-1"], ["--lr", "-1"]), (["--clip", "inf"], ["--clip", "inf"]),
    (["--model", "gan"], ["--model", "dit, unet", "gan"]), (["--preset", "huge"], ["--preset", "huge", "tiny"]), (["--objects", "3"], ["--objects", "1, 2"]),
    (["--patch", "5"], ["patch 5", "pixels 24"]), (["--model", "unet", "--width", "100"], ["width 100"]), (["extra"], ["extra"]),
    (["--seed", "-1"], ["--seed"]), (["--caption_dropout", "1.1"], ["--caption_dropout", "1.1"]), (["--out"], ["--out"])])
def test_flags_are_checked(tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    refused(["--preset", "tiny", *flags], *words)
    assert not list(tmp_path.iterdir())


def test_absent_cuda_is_named(tmp_path, monkeypatch, finished):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(["--device", "cuda"], "cuda")
    refused(["--preset", "gpu"], "cuda")
    refused(["sample", "--checkpoint", finished / "checkpoint.pt", "--device", "cuda", CAPTION], "cuda")
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_not_touched(tmp_path, finished):
    before = {file.name: file.read_bytes() for file in finished.iterdir()}
    refused(tiny(finished), "--resume", "--out")
    refused(tiny(finished, "--seed", 1, "--resume"), "--seed 0, not 1")
    refused(tiny(finished, "--model", "unet", "--resume"), "--model dit, not unet")
    assert before == {file.name: file.read_bytes() for file in finished.iterdir()}
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    refused(tiny(other), "not empty")
    refused(tiny(other, "--resume"), "cannot be read")
    assert [file.name for file in other.iterdir()] == ["thesis.txt"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(tiny(tmp_path / "file"), "file")
    refused(tiny(tmp_path / "file" / "below"), "file")
    refused(tiny("/proc/none"), "/proc/none")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("kind", ["missing", "truncated", "empty", "text", "foreign", "a tensor", "a folder", "fields", "version"])
def test_bad_checkpoints_are_named(tmp_path, finished, kind):
    file, good = tmp_path / "checkpoint.pt", (finished / "checkpoint.pt").read_bytes()
    if kind in ("truncated", "empty", "text"):
        file.write_bytes({"truncated": good[:len(good) // 2], "empty": b"", "text": b"hello\n"}[kind])
    elif kind == "a folder":
        file.mkdir()
    elif kind != "missing":
        torch.save({"foreign": {"model": 1}, "a tensor": torch.zeros(2), "fields": {"format": train.FORMAT, "settings": {}},
                    "version": dict.fromkeys(train.CONTENT, 0) | {"format": train.FORMAT, "settings": {"batches": 4}}}[kind], file)
    refused(["sample", "--checkpoint", file, "--out", tmp_path / "out.png", CAPTION], "checkpoint.pt")
    refused(["--resume", "--out", tmp_path], "checkpoint.pt")
    refused(tiny(tmp_path / "new", "--init", file), "checkpoint.pt")
    assert not (tmp_path / "out.png").exists() and not (tmp_path / "new").exists()


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path, finished):
    file = finished / "pretrained.pt"
    refused(["sample", "--checkpoint", file, "--model", "unet", "--out", tmp_path / "x.png", CAPTION], "--model dit, not unet")
    refused(tiny(tmp_path / "new", "--model", "unet", "--init", file), "--model dit, not unet")
    refused(tiny(tmp_path / "new", "--width", 48, "--init", file), "--width 24, not 48")
    assert not list(tmp_path.iterdir())


def test_a_caption_with_an_unknown_word_is_refused(tmp_path, finished):
    refused(["sample", "--checkpoint", finished / "checkpoint.pt", "--out", tmp_path / "x.png", CAPTION, "macro purple circle"], "purple", "red")
    assert not list(tmp_path.iterdir())


def test_the_exit_status_is_not_zero_and_there_is_no_traceback(tmp_path):
    done = subprocess.run(**program(*tiny(tmp_path / "run", "--batch", 0)))
    assert done.returncode == 1 and done.stdout.count("\n") == 1 and "Traceback" not in done.stdout


# --- what it computes and reports ---

def test_the_report_holds_what_it_promises(finished):
    assert {file.name for file in finished.iterdir()} == {"log.csv", "checkpoint.pt", "pretrained.pt", "report.json", "samples.png", "curves.png"}
    report = json.loads((finished / "report.json").read_text())
    assert [(row["model"], row["domain"], row["split"], row["view"]) for row in report["rows"]] == [
        ("pretrained", "base", split, "macro") for split in ("seen", "held_out")] + [
        ("fine-tuned", "target", split, view) for split in ("seen", "held_out") for view in train.GRANULARITIES]
    for row in report["rows"]:
        assert row["ceiling"] == 1 and row["error"] > 0 and row["floor"] > 0
        assert abs(row["loss"] - row["error"] - row["floor"]) < 0.05 * row["loss"]      # Eq. 5, up to the sampling of few images
    log = rows(finished)
    assert list(csv.reader(open(finished / "log.csv")))[0] == train.COLUMNS
    assert [int(row["step"]) for row in log] == [2, 4, 6, 8, 10, 12] and float(log[-1]["lr"]) > 0
    assert [row["phase"] for row in log] == ["pretrain"] * 4 + ["finetune"] * 2
    assert log[0]["val_loss_meso"] == "" != log[-1]["val_loss_meso"]


# --- the probe ---

def test_a_probed_run_is_bit_identical_and_goes_on_after_a_stop(tmp_path, finished):
    folder = tmp_path / "probed"
    assert train.main(tiny(folder, "--probe", 2)) is None
    for name in ("checkpoint.pt", "pretrained.pt"):
        a, b = (torch.load(run / name, weights_only=True) for run in (folder, finished))
        assert a["settings"].pop("probe") == 2 and b["settings"].pop("probe") == 0
        a, b = (dict(tensors(content)) for content in (a, b))
        assert all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a.keys() - {"/seconds"})
    assert (folder / "probe.png").stat().st_size > 10000
    probed = train.read_probe(folder)
    assert [row["step"] for row in probed] == [0, *(int(row["step"]) for row in rows(folder))]
    # killed while it wrote the last line, after the checkpoint of step 8
    (folder / "checkpoint.pt").write_bytes((folder / "pretrained.pt").read_bytes())
    lines = (folder / "probe.jsonl").read_text()
    (folder / "probe.jsonl").write_text(lines[:-50])
    assert train.main([*tiny(folder)[2:], "--resume"]) is None
    assert train.read_probe(folder) == probed


@pytest.mark.parametrize("model", ["dit", "unet"])
def test_the_probe_is_that_of_the_clear_route_at_the_runs_own_weights(tmp_path, model):
    s = train.parse_settings(tiny(tmp_path, "--model", model, "--probe", 2))[1]
    run = train.Run(s)
    for step in range(3):
        run.train_step(None)
        train.append_probe(run, train.probe_batch(s), tmp_path)
    inputs, u, labels = train.probe_batch(s)
    inputs = (inputs[0].double(), inputs[1].double(), inputs[2])
    run.model.double()
    f = lambda weights, *one: torch.func.functional_call(run.model, weights, tuple(z[None] for z in one))[0]
    params = {name: p.detach() for name, p in run.model.named_parameters()}
    r = torch.func.vmap(lambda *one: f(params, *one))(*inputs) - u
    M, row = ntk.interaction_matrix(f, params, inputs, r), train.read_probe(tmp_path)[-1]
    assert torch.allclose(torch.tensor(row["M"], dtype=torch.float64), M, atol=1e-4 * M.abs().max().item())
    assert abs(row["trace"] + row["cross"] + M.sum().item() / len(M) ** 2) < 1e-4 * M.sum().item() / len(M) ** 2
    assert train.read_probe(tmp_path)[0]["drift"] == 0 < row["drift"]


def test_the_kinds_of_pairs_are_counted_by_what_they_share():
    g = torch.tensor([[1.0, 0.0], [-1.0, 0.1], [1.0, 0.2], [0.5, -2.0]])   # two roots at two levels
    labels = torch.tensor([[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1]])
    found = train.geometry(g @ g.T, g, labels)["pairs"]
    assert {kind: values["conflict"] for kind, values in found.items()} == {"root view": 0.5, "view level": 0.5, "view": 0.5}
    assert found["view level"]["cosine"] == pytest.approx((torch.cosine_similarity(g[0], g[2], 0) + torch.cosine_similarity(g[1], g[3], 0)).item() / 2)


def test_a_probe_of_more_roots_than_there_are_is_refused(tmp_path):
    refused(tiny(tmp_path / "run", "--probe", 5), "--probe", "--roots", "4")
    assert not (tmp_path / "run").exists()


def test_the_cover_is_drawn(tmp_path):
    assert train.main(tiny(tmp_path / "run", "--probe", 2)) is None
    spec = importlib.util.spec_from_file_location("cover", ROOT / "results/cover.py")
    cover = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        spec.loader.exec_module(cover)
        cover.main(str(tmp_path / "run"), str(tmp_path / "cover.png"))
    assert (tmp_path / "cover.png").stat().st_size > 10_000


# --- the method ---

def test_validation_is_zero_error_for_the_exact_velocity():
    s = train.Settings(eval_images=16, pixels=8)
    held = train.validation_set("base", "seen", "macro", s, None)
    x0, e, t, tokens, u_star = held
    exact = train.validate(lambda x, t, c: u_star, held, s)
    assert exact["error"] == 0 and exact["loss"] == exact["floor"]
    wrong = train.validate(lambda x, t, c: u_star + 0.5, held, s)
    assert abs(wrong["error"] - 0.25) < 1e-6 and wrong["floor"] == exact["floor"]


def test_seen_captions_of_the_target_are_those_of_the_roots():
    s = train.Settings(roots=5, eval_images=20)
    roots = train.draw_roots(s)
    tests = train.test_scenes("target", "seen", s, roots, 4)
    told = lambda scenes: set(train.toy_data.captions(scenes, "macro"))
    assert told(tests) == told(roots)
    assert not told(train.test_scenes("target", "held_out", s, roots, 4)) & told(roots)


def test_fine_tuning_sees_only_the_roots_at_three_granularities():
    s = train.Settings(roots=4, tuples=100, pixels=8, caption_dropout=0.0, finetune_steps=1)
    roots, generator = train.draw_roots(s), train.seeded(s, 0)
    x0, tokens, t, e, a = train.draw_batch(s, generator, train.make_plan(s))
    told = {" ".join(train.toy_data.WORDS[k] for k in row if k) for row in tokens.tolist()}
    assert told == {text for view in train.GRANULARITIES for text in train.toy_data.captions(roots, view)}
    assert len(x0.flatten(1).unique(dim=0)) <= 12 and len(e.flatten(1).unique(dim=0)) == 300


# --- the arms ---

ARMS = dict(roots=10, tuples=4, finetune_steps=30, pixels=8, smallest_object=0.24, caption_dropout=0.0)


@pytest.mark.parametrize("arm", [arm for arm in train.ARMS if arm not in ("big", "baseline")])
@pytest.mark.parametrize("model", ["dit", "unet"])
def test_every_arm_has_the_images_and_the_steps_of_the_baseline(arm, model):
    plan, baseline = (train.make_plan(train.Settings(arm=name, model=model, **ARMS)) for name in (arm, "baseline"))
    sizes = [len(views) for views, _ in plan.steps]
    assert len(set(sizes)) > 1                                             # tuples of two and of three views
    assert sizes == [len(views) for views, _ in baseline.steps] and plan.images(None) == sum(sizes)
    for views, a in plan.steps:
        assert len(views) == len(a)
        assert (a == 1 / (3 * 4)).all() if arm == "tuple_max" else a.sum() == pytest.approx(1)
    if arm == "whole":
        assert all((plan.granularity[views] == 0).all() for views, _ in plan.steps)
    # a twin whose tuples change size is noticed by the same comparison
    other = train.make_plan(train.Settings(arm=arm, model=model, seed=1, **ARMS))
    assert [len(views) for views, _ in other.steps] != sizes


def test_the_big_arm_has_the_images_of_the_baseline_in_a_third_of_the_steps():
    s, base = (train.Settings(arm=arm, **ARMS) for arm in ("big", "baseline"))
    big, small = train.make_plan(s), train.make_plan(base)
    assert len(big.steps) == train.updates(s) == 10 and train.updates(base) == 30 and big.images(None) == small.images(None)
    assert torch.equal(torch.cat([v for v, _ in big.steps]), torch.cat([v for v, _ in small.steps]))
    assert all(a.sum() == pytest.approx(1) for _, a in big.steps)
    assert train.learning_rate(s, "finetune", 10) == pytest.approx(s.finetune_lr * 0.1)


def met(arm, **more):
    """Each tuple that an arm puts together, as (roots, granularities)."""
    plan = train.make_plan(train.Settings(arm=arm, **ARMS | more))
    size = {g: int((plan.root == g).sum()) for g in plan.root.tolist()}
    for views, a in plan.steps:
        start = 0
        while start < len(views):
            n = max(1, round(1 / (4 * a[start].item())))                   # its weight is 1 / (4 K_g)
            yield plan.root[views[start:start + n]].tolist(), plan.granularity[views[start:start + n]].tolist(), size
            start += n


def test_who_meets_in_a_tuple():
    assert all(len(set(roots)) == 1 and len(roots) == size[roots[0]] for roots, _, size in met("tuple"))
    assert all(kinds == list(range(len(kinds))) for _, kinds, _ in met("stratified"))
    assert sum(len(set(roots)) == 1 for roots, _, _ in met("stratified")) < 30
    assert sum(kinds != list(range(len(kinds))) for _, kinds, _ in met("random")) > 60


def test_the_noise_levels_of_the_arms():
    def mean_logits(arm):
        s = train.Settings(arm=arm, **ARMS | {"tuples": 4000, "finetune_steps": 1})
        plan = train.make_plan(s)
        t, (views, _) = train.draw_batch(s, train.seeded(s, 0), plan, 0, train.parts(s)["offsets"])[2], plan.steps[0]
        return [torch.logit(t)[plan.granularity[views] == g].mean().item() - s.time_mean for g in range(3)], t
    own, flipped, mixed = mean_logits("offsets"), mean_logits("flipped"), mean_logits("global")
    assert own[0] == pytest.approx([0.5, 0, -0.5], abs=0.06) and flipped[0] == pytest.approx([-0.5, 0, 0.5], abs=0.06)
    assert max(mixed[0]) - min(mixed[0]) < 0.12                            # the same levels in all, whatever the granularity
    assert torch.logit(mixed[1]).std() == pytest.approx(torch.logit(own[1]).std().item(), abs=0.03)
    assert mean_logits("baseline")[0] == pytest.approx([0, 0, 0], abs=0.06)


def test_the_measured_arm_follows_its_matrix_and_survives_a_stop(tmp_path):
    """Its offsets are new at every row of the log, and a run stopped between two rows goes on with those in force."""
    flags = ["--arm", "measured", "--finetune_steps", 6, "--probe", 2]
    assert train.main(tiny(tmp_path / "whole", *flags)) is None
    offsets = [tuple(row["offsets"]) for row in train.read_probe(tmp_path / "whole")]
    assert set(offsets[:5]) == {(0, 0, 0)} and len(set(offsets[5:])) == 3  # none in the pretraining
    s, content = train.load(tmp_path / "whole/checkpoint.pt")
    run = train.Run(s)
    run.restore(content)
    inputs, u, labels = train.probe_batch(train.dataclasses.replace(s, probe=4))
    M = ntk.fast_interaction_matrix(run.model, inputs, (run.model(*inputs) - u).detach()).detach()
    run.measure_offsets()
    assert run.offsets == pytest.approx(train.sga.measured_offsets(M, labels[:, 1], inputs[1]).tolist(), abs=1e-5)
    step = train.Run.train_step
    def stopping(run, plan):
        norm = step(run, plan)
        if run.step == 11:
            os.kill(os.getpid(), signal.SIGINT)
        return norm
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Run, "train_step", stopping)
        assert "step 11" in train.main(tiny(tmp_path / "stopped", *flags))
    assert train.main(tiny(tmp_path / "stopped", *flags, "--resume")) is None
    assert same(tmp_path / "whole/checkpoint.pt", tmp_path / "stopped/checkpoint.pt")


@pytest.mark.parametrize("model, arm", [("dit", "min_snr"), ("unet", "min_snr"), ("unet", "sga"), ("dit", "sga"), ("unet", "baseline")])
def test_min_snr_weighs_the_loss_of_its_arms_alone(model, arm):
    """Eq. 20: the weight of a step over that of its plan is 1 above the threshold of each granularity, and gamma / SNR below."""
    s = train.Settings(model=model, arm=arm, **ARMS | {"tuples": 400, "finetune_steps": 1, "time_mean": -1.0})
    plan = train.make_plan(s)
    views, planned = plan.steps[0]
    *_, t, _, a = train.draw_batch(s, train.seeded(s, 0), plan)
    t, ratio = t.double(), (a / planned).double()
    for g, gamma in enumerate((4, 5, 7)):
        own = plan.granularity[views] == g
        capped = own & ((1 - t) / t > gamma**0.5)
        assert capped.sum() > 20 and (ratio[own & ~capped] == 1).all()
        expected = gamma * t[capped] ** 2 / (1 - t[capped]) ** 2
        weighs = (arm, model) != ("sga", "dit") and arm != "baseline"      # the others are the twins
        assert torch.allclose(ratio[capped], expected if weighs else torch.ones_like(expected), rtol=1e-4)


def test_validation_is_at_evenly_spread_noise_levels_and_knows_its_thirds(tmp_path, finished):
    s = train.Settings(eval_images=12, pixels=8)
    t = train.validation_set("base", "seen", "macro", s, None)[2]
    assert t.diff().max() - t.diff().min() < 1e-6 and t[0] == pytest.approx(1 / 24) and t[-1] == pytest.approx(23 / 24)


def test_the_method_is_tuples_and_the_scale_of_its_network():
    dit, unet = (train.parts(train.Settings(model=model)) for model in ("dit", "unet"))
    assert dit["tuples"] == unet["tuples"] == "root"
    assert dit["offsets"] == train.sga.OFFSETS and not dit["weights"]
    assert unet["offsets"] == (0, 0, 0) and unet["weights"]


def test_fine_tuning_begins_with_the_averaged_weights_and_a_new_optimizer():
    run = train.Run(train.Settings(width=24, depth=1, batch=2, pixels=8))
    for _ in range(3):
        run.train_step(None)
    pairs = lambda: zip(run.model.parameters(), run.ema.parameters())
    assert not all(torch.equal(a, b) for a, b in pairs()) and run.optimizer.state
    run.begin_finetuning()
    assert all(torch.equal(a, b) for a, b in pairs()) and not run.optimizer.state


def test_captions_are_dropped_sample_by_sample():
    s = train.Settings(batch=4000, pixels=8, caption_dropout=0.25)
    tokens = train.draw_batch(s, train.seeded(s, 0))[1]
    assert abs((tokens == 0).all(1).float().mean() - 0.25) < 0.03


def test_learning_rate_rises_then_falls_to_zero():
    s = train.Settings(pretrain_steps=100, warmup=10, lr=0.5)
    rates = [train.learning_rate(s, "pretrain", step) for step in range(1, 102)]
    assert rates[0] == pytest.approx(0.05) and max(rates) <= 0.5 and rates[-1] == 0
    assert all(a < b for a, b in zip(rates[:9], rates[1:10])) and all(a > b for a, b in zip(rates[11:], rates[12:]))


def test_training_learns(tmp_path):
    """A few steps lower the loss well below its start, that of predicting nothing."""
    s = train.Settings(width=32, depth=2, pretrain_steps=150, batch=16, pixels=8, warmup=10)
    run, first = train.Run(s), None
    for _ in range(150):
        run.train_step(None)
        first = first or run.loss
    assert run.loss < 0.6 * first


def test_wilson_interval_against_known_values():
    assert train.wilson(0.0, 10) == pytest.approx([0.0, 0.2775], abs=1e-3)
    assert train.wilson(0.5, 10) == pytest.approx([0.2366, 0.7634], abs=1e-3)
    assert train.wilson(0.9, 100) == pytest.approx([0.8256, 0.9448], abs=1e-3)


@pytest.mark.parametrize("model", ["dit", "unet"])
def test_the_code_path_of_the_gpu_preset_runs_small_on_the_cpu(tmp_path, monkeypatch, model):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network: compiled(network, backend="eager"))     # its own backend takes minutes here
    small = train.PRESETS["tiny", model] | {"pretrain_steps": 1, "finetune_steps": 1, "every": 1, "eval_images": 2, "sample_steps": 1}
    flags = [word for name, value in (small | {"model": model, "device": "cpu", "pixels": 32}).items() for word in (f"--{name}", str(value))]
    assert train.main(["--preset", "gpu", *flags, "--out", str(tmp_path / "run")]) is None
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["settings"]["precision"] == "bfloat16" and report["settings"]["objects"] == 2


def test_sample_draws_what_is_typed(tmp_path, finished):
    file = tmp_path / "drawn.png"
    assert train.main(["sample", "--checkpoint", str(finished / "checkpoint.pt"), "--out", str(file), CAPTION, "meso blue plain cross on grey"]) is None
    assert file.read_bytes()[:4] == b"\x89PNG"


def test_fine_tuning_can_start_from_a_pretrained_checkpoint(tmp_path, finished):
    """--init ends where the run that pretrained it ends, up to the data that it sees: only the fine-tuning's rows are there."""
    assert train.main(tiny(tmp_path / "run", "--init", finished / "pretrained.pt")) is None
    assert [row["phase"] for row in rows(tmp_path / "run")] == ["finetune"] * 2


def test_help_explains_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit) as leaving:
        train.main(["--help"])
    assert leaving.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in train.dataclasses.fields(train.Settings):
        assert f"--{field.name} " in text and field.metadata["help"].split(",")[0][:40] in text
    assert text.count("default") >= len(train.dataclasses.fields(train.Settings))
