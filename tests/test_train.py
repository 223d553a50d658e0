"""A run of train.py survives whatever stops it, refuses what is wrong in one sentence, and reports
what it measured; and its steps are those of the method.
"""

import contextlib
import csv
import dataclasses
import importlib
import io
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import flow_matching as fm
import ntk
import sga
import toy_data
import train
from support import book, machine, pictures, report

ROOT = Path(__file__).parent.parent
CAPTION = "macro red striped circle top left on grey"
PIXELS = 8


def tiny(folder, *more):
    """The flags of a run of 10 steps, 6 of them in the pretraining, with a probe of two roots.

    It has rows and checkpoints at the steps 4, 6 (the end of a phase), 8 and 10.
    """
    flags = ["--preset", "tiny", "--device", "cpu", "--pixels", PIXELS, "--probe", 2,
             "--pretrain_steps", 6, "--every", 4]
    return [str(flag) for flag in [*flags, "--out", folder, *more]]


def settings(**more):
    """Of a tiny network on small images, for the tests that need no folder."""
    return train.Settings(**train.TINY | {"pixels": PIXELS} | more)


def refused(arguments, *words):
    """The sentence with which the program refuses these arguments; these words are in it."""
    with pytest.raises(SystemExit) as refusal:
        train.main([str(argument) for argument in arguments])
    sentence = refusal.value.code
    assert isinstance(sentence, str) and sentence.startswith("train.py: ")
    assert "\n" not in sentence
    for word in words:
        assert word in sentence, sentence
    return sentence


def contents(folder):
    """The bytes of all files in a folder, by name."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def leaves(content, path=""):
    """Every tensor, number and text of a checkpoint, with its path."""
    if isinstance(content, dict):
        entries = content.items()
    elif isinstance(content, (list, tuple)):
        entries = enumerate(content)
    else:
        yield path, content
        return
    for name, value in entries:
        yield from leaves(value, f"{path}/{name}")


def checkpoint(file):
    """What is in a checkpoint of ours, unpickled the fast way, which trusts it."""
    return torch.load(file, weights_only=False)


def differing(file, other, aside=("seconds", "images_per_s")):
    """The paths at which two checkpoints are not the same to the bit, what is aside left out."""
    one, two = (dict(leaves(checkpoint(f))) for f in (file, other))
    found = list(one.keys() ^ two.keys())
    for path in one.keys() & two.keys():
        a, b = one[path], two[path]
        equal = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        if not equal:
            found.append(path)
    return sorted(path for path in found if path.split("/")[-1] not in aside)


def not_as(folder, other):
    """What differs between the checkpoints and the rows of two runs; nothing, it is hoped."""
    found = differing(folder / "checkpoint.pt", other / "checkpoint.pt")
    found += differing(folder / "pretrained.pt", other / "pretrained.pt")
    if rows(folder) != rows(other):
        found.append("log.csv")
    if book.read_probe(folder) != book.read_probe(other):
        found.append("probe.jsonl")
    return found


def rows(folder):
    """The rows of the log, without what hangs on the clock."""
    found = book.read_log(folder)
    for row in found:
        del row["images_per_s"]
    return found


def report_of(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def step_of(folder):
    return checkpoint(folder / "checkpoint.pt")["step"]


def weights_of(folder):
    """All weights of a run's checkpoint as one vector."""
    model = checkpoint(folder / "checkpoint.pt")["model"]
    return torch.cat([weight.flatten() for weight in model.values()])


@contextlib.contextmanager
def after_step(number, action):
    """Within, an action follows this step of any run."""
    original = train.Run.train_step

    def train_step(run):
        norm = original(run)
        if run.step == number:
            action()
        return norm

    with patch.object(train.Run, "train_step", train_step):
        yield


def interrupt():
    """What Ctrl-C does."""
    os.kill(os.getpid(), signal.SIGINT)


def nothing(*_):
    pass


@pytest.fixture
def only_training(monkeypatch):
    """Runs end with their last step: no report is made, which takes longer than the training."""
    monkeypatch.setattr(report, "report", nothing)


@pytest.fixture
def without_pictures(monkeypatch):
    monkeypatch.setattr(report, "draw_all", nothing)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a tiny run that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert train.main(tiny(folder)) is None
    return folder


def test_the_last_line_names_the_files_that_a_run_has_made(tmp_path, finished, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    capsys.readouterr()
    train.main(["--resume", "--out", str(folder)])
    last = capsys.readouterr().out.splitlines()[-1]
    named = last.partition(f"are in {folder}: ")[2].split(", ")
    assert {"report.json", "samples.png", "curves.png", "probe.png"} == set(named)
    assert all((folder / name).stat().st_size > 0 for name in named)


# --- A run survives -------------------------------------------------------------------------------

def test_a_kill_after_the_last_checkpoint_and_before_its_rows_is_made_good(
        tmp_path, finished, only_training):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for name in ("log.csv", "probe.jsonl"):
        (folder / name).write_bytes(b"")
    train.main(["--resume", "--out", str(folder)])
    assert contents(folder) == contents(finished)


def kill():
    """Ends this process at once: no `finally`, no `except`, no clearing up."""
    os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def before_writing(name):
    """Within, the process is killed when a file of this name is written, but not yet in place."""
    original = os.replace

    def replace(source, target):
        if os.path.basename(target) == name:
            kill()
        original(source, target)

    with patch.object(os, "replace", replace):
        yield


def killed(arguments, moment):
    """The work of a process of its own: the program, until it is killed at the moment."""
    with moment[0](*moment[1:]):
        train.main(arguments)


def test_killed_at_any_moment_and_resumed_it_ends_bit_identical(tmp_path, processes, finished,
                                                                without_pictures):
    folder = tmp_path / "run"
    moments = [
        # The step of the checkpoint that each kill leaves behind, and the moment of the kill.
        (None, before_writing, "checkpoint.pt"),
        (0, after_step, 3, kill),
        (0, before_writing, "checkpoint.pt"),
        (4, before_writing, "log.csv"),
        (4, before_writing, "pretrained.pt"),
        (6, before_writing, "probe.jsonl"),
        (8, after_step, 9, kill),
        (10, before_writing, "report.json"),
    ]
    resume = []
    for step, *moment in moments:
        process = processes.start(killed, tiny(folder, *resume), moment)
        assert processes.status_of(process) == -signal.SIGKILL, moment
        if step is None:
            # Nothing was there to resume: the same command is given again.
            assert list(contents(folder)) == ["checkpoint.pt.tmp"]
        else:
            assert step_of(folder) == step
            resume = ["--resume"]
    train.main(tiny(folder, "--resume"))
    assert not_as(folder, finished) == []
    assert report_of(folder)["rows"] == report_of(finished)["rows"]
    assert not list(folder.glob("*.tmp"))


@pytest.fixture(scope="module")
def half_way(tmp_path_factory):
    """The folder of a run that Ctrl-C has stopped three times, each time to be resumed.

    After step 3, between two rows of the log; after 6, the end of the first phase; and after 7.
    """
    folder = tmp_path_factory.mktemp("runs") / "half_way"
    resume = []
    for step in (3, 6, 7):
        before = signal.getsignal(signal.SIGINT)
        with after_step(step, interrupt):
            sentence = refused(tiny(folder, *resume))
        assert sentence == f"train.py: interrupted: step {step} is saved, go on with --resume"
        assert signal.getsignal(signal.SIGINT) is before
        assert step_of(folder) == step
        resume = ["--resume"]
    return folder


def test_control_c_saves_the_step_and_resuming_goes_on(tmp_path, finished, half_way, only_training):
    folder = tmp_path / "run"
    shutil.copytree(half_way, folder)
    train.main(tiny(folder, "--resume"))
    assert not_as(folder, finished) == []


def test_control_c_after_the_training_is_one_sentence(tmp_path, finished, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    monkeypatch.setattr(report, "evaluate", interrupted)
    refused(tiny(folder, "--resume"), "interrupted", "--resume")
    assert contents(folder) == contents(finished)


def test_a_second_control_c_does_not_wait_for_the_step():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), machine.finishing_the_step() as interrupts:
        interrupt()
        assert interrupts == [True]                                # the first one waits
        interrupt()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_in_a_thread_is_a_run(tmp_path, finished, only_training):
    """Only the main thread hears of Ctrl-C; a notebook's widgets start others."""
    folder = tmp_path / "run"
    thread = threading.Thread(target=train.main, args=[tiny(folder)])
    thread.start()
    thread.join()
    assert not_as(folder, finished) == []


def forget_generator(run):
    run.generator = machine.seeded(run.settings, 0)


def forget_optimizer(run):
    run.new_optimizer()


def forget_average(run):
    run.ema.load_state_dict(train.build(run.settings).state_dict())


def forget_weights(run):
    run.model.load_state_dict(train.build(run.settings).state_dict())


def forget_offsets(run):
    run.offsets = (0.0, 0.0, 0.0)


def forget_loss(run):
    run.loss.fill_(torch.nan)


def forget_rows(run):
    run.log, run.probe = [], []


FORGETFUL = [forget_generator, forget_optimizer, forget_average, forget_weights, forget_offsets,
             forget_loss, forget_rows]


@pytest.mark.parametrize("forget", FORGETFUL)
def test_a_resume_that_forgets_something_is_noticed(tmp_path, monkeypatch, finished, half_way,
                                                    only_training, forget):
    """The twins: whatever restore leaves out, the end is another one."""
    folder = tmp_path / "run"
    shutil.copytree(half_way, folder)
    restore = train.Run.restore

    def forgetful(run, content):
        restore(run, content)
        forget(run)

    monkeypatch.setattr(train.Run, "restore", forgetful)
    train.main(tiny(folder, "--resume"))
    assert not_as(folder, finished) != []


def test_resuming_may_change_what_changes_no_result(tmp_path, monkeypatch, finished, half_way,
                                                    only_training):
    compiled = []
    monkeypatch.setattr(machine, "what_compiling_lacks", lambda device: "")
    monkeypatch.setattr(torch, "compile", lambda network: compiled.append(network) or network)
    folder = tmp_path / "run"
    shutil.copytree(half_way, folder)
    train.main(tiny(folder, "--resume", "--chunk", 2, "--compile", 1))
    assert len(compiled) == 1
    content = checkpoint(folder / "checkpoint.pt")
    assert (content["settings"]["chunk"], content["settings"]["compile"]) == (2, 1)
    ours, theirs, before = (weights_of(run) for run in (folder, finished, half_way))
    # Rounding errors, against what the resumed steps changed.
    assert (ours - theirs).norm() < 1e-3 * (theirs - before).norm()


# --- What is not finite is named ------------------------------------------------------------------

@contextlib.contextmanager
def sixth_call(where, name, spoil):
    """Within, the answer of the sixth call of a function is another one."""
    original, calls = getattr(where, name), []

    def function(*arguments):
        calls.append(name)
        answer = original(*arguments)
        return spoil(answer) if len(calls) == 6 else answer

    with patch.object(where, name, function):
        yield


def not_a_number(answer):
    return answer * torch.nan


def infinite(answer):
    return answer * torch.inf


def infinite_weight(batch):
    *others, a = batch
    return *others, a / torch.tensor([0.0, 1.0, 1.0, 1.0])


def steep(loss):
    """The same loss, whose gradient is not finite: that of a root at 0."""
    return loss + (loss - loss.detach()).sqrt()


# What is spoiled in step 6, by what, and what the sentence must blame.
SPOILED = [
    (sga, "offset_time", not_a_number, "a noise level"),
    (train, "draw_batch", infinite_weight, "a sample's weight in the loss"),
    (fm, "loss", not_a_number, "the loss"),
    (fm, "loss", infinite, "the loss"),
    (fm, "loss", steep, "the gradient"),
]


@pytest.mark.parametrize("where, name, spoil, blamed", SPOILED)
def test_what_is_not_finite_first_is_named_and_the_checkpoint_kept(tmp_path, where, name, spoil,
                                                                   blamed):
    folder = tmp_path / "run"
    with sixth_call(where, name, spoil):
        sentence = refused(tiny(folder, "--probe", 0),
                           f"train.py: {blamed} of step 6 is not finite")
    # A lower learning rate is advised only where it can help.
    assert ("--lr" in sentence) == (name == "loss")
    content = checkpoint(folder / "checkpoint.pt")
    assert content["step"] == 4
    assert all(weight.isfinite().all() for weight in content["model"].values())


def test_a_run_that_was_not_finite_can_be_resumed(tmp_path, finished, only_training):
    folder = tmp_path / "run"
    with sixth_call(fm, "loss", not_a_number):
        refused(tiny(folder), "not finite")
    train.main(tiny(folder, "--resume"))
    assert not_as(folder, finished) == []


def test_control_c_saves_nothing_that_is_not_finite(tmp_path):
    folder = tmp_path / "run"
    flags = ["--pretrain_steps", 100, "--every", 100]
    with sixth_call(fm, "loss", not_a_number), after_step(7, interrupt):
        refused(tiny(folder, *flags), "the loss of step 6 is not finite")
    assert step_of(folder) == 0


# --- A disk that fills, and memory that runs out --------------------------------------------------

def full_disk(*_):
    raise OSError(28, "No space left on device")


def at_fsync(file):
    return patch.object(os, "fsync", full_disk)


def at_replace(file):
    return patch.object(os, "replace", full_disk)


def at_write(file):
    """What is written to /dev/full meets a full disk."""
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full, which Linux has")
    os.symlink("/dev/full", f"{file}.tmp")
    return contextlib.nullcontext()


@pytest.mark.parametrize("moment", [at_write, at_fsync, at_replace])
def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path, half_way, moment):
    file = tmp_path / "checkpoint.pt"
    shutil.copy(half_way / "checkpoint.pt", file)
    run = train.resumed_run({}, tmp_path)
    run.step += 1
    before = contents(tmp_path)
    with moment(file), pytest.raises(OSError, match="No space left") as failure:
        run.save(str(file))
    assert failure.value.filename == str(file)
    assert contents(tmp_path) == before
    run.save(str(file))
    assert contents(tmp_path) != before                            # the twin that does not fail


def test_a_disk_that_fills_is_one_sentence_and_the_run_goes_on_later(tmp_path, finished,
                                                                     only_training):
    folder = tmp_path / "run"

    def fill():
        at_write(folder / "checkpoint.pt")

    with after_step(8, fill):
        refused(tiny(folder), "checkpoint.pt cannot be read or written: No space left on device")
    assert step_of(folder) == 6
    assert not list(folder.glob("*.tmp"))
    train.main(tiny(folder, "--resume"))
    assert not_as(folder, finished) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), OSError(28, "full")])
def test_a_save_that_ends_in_any_way_leaves_no_half_file(tmp_path, error):
    file = tmp_path / "picture.png"
    file.write_bytes(b"before")
    with pytest.raises(type(error)), book.unfinished(str(file)) as name:
        Path(name).write_bytes(b"half")
        raise error
    assert contents(tmp_path) == {"picture.png": b"before"}
    with book.unfinished(str(file)) as name:                       # the twin
        Path(name).write_bytes(b"whole")
    assert contents(tmp_path) == {"picture.png": b"whole"}


def test_an_empty_disk_at_the_start_leaves_nothing_behind(tmp_path):
    folder = tmp_path / "run"
    with at_fsync(folder):
        refused(tiny(folder), "No space left on device")
    assert not list(folder.iterdir())


class Wanting:
    """A function that asks for more memory than there is, in various words."""

    def __init__(self, error):
        self.error = error

    def __call__(self, *_, **__):
        if self.error is None:
            return torch.empty(10**15)
        raise self.error


@pytest.mark.parametrize("error", [
    None, MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: out of memory")])
def test_memory_that_runs_out_is_one_sentence_that_names_what_to_lower(tmp_path, monkeypatch,
                                                                       error):
    monkeypatch.setattr(fm, "loss", Wanting(error))
    sentence = refused(tiny(tmp_path / "run"), "out of memory", "--chunk", "--batch")
    assert sentence.index("--chunk") < sentence.index("--batch")


def test_a_checkpoint_for_which_memory_is_lacking_is_not_called_damaged(monkeypatch, finished):
    monkeypatch.setattr(torch, "load", Wanting(MemoryError()))
    sentence = refused(["--resume", "--out", finished], "out of memory")
    assert "not a checkpoint" not in sentence


def test_an_error_of_ours_is_not_taken_for_lack_of_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(fm, "loss", Wanting(RuntimeError("shapes do not fit")))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        train.main(tiny(tmp_path / "run"))


# --- Refusals: one sentence, and nothing overwritten ----------------------------------------------

FLAGS = [
    # What is typed, and what the refusal must name.
    ("--colour red", "--colour"),
    ("--batch many", "--batch many"),
    ("--batch 0", "--batch from 1 0"),
    ("--batch 1.5", "--batch"),
    ("--lr nan", "--lr nan"),
    ("--lr -1", "--lr -1"),
    ("--clip inf", "--clip inf"),
    ("--model gan", "--model dit unet gan"),
    ("--preset huge", "--preset huge tiny"),
    ("--objects 3", "--objects 1 2"),
    ("--patch 5", "patch 5 pixels 24"),
    ("--model unet --width 100", "width 100"),
    ("extra", "extra"),
    ("--seed -1", "--seed"),
    ("--caption_dropout 1.1", "--caption_dropout 1.1"),
    ("--out", "--out"),
    ("--arm best", "--arm best baseline sga"),
    ("--probe 5", "--probe --roots 4 5"),
    # As of a variable of the shell that is not set.
    ("--init=", "--init empty"),
    ("--out=", "--out empty"),
    ("sample", "--checkpoint"),
]


@pytest.mark.parametrize("typed, named", FLAGS)
def test_flags_are_checked(tmp_path, monkeypatch, typed, named):
    monkeypatch.chdir(tmp_path)
    preset = [] if typed == "sample" else ["--preset", "tiny"]
    refused([*typed.split(), *preset], *named.split())
    assert not list(tmp_path.iterdir())


def test_an_absent_gpu_is_named(tmp_path, monkeypatch, finished):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    checkpoint = finished / "checkpoint.pt"
    refused(["--device", "cuda"], "cuda")
    refused(["--preset", "gpu"], "cuda")
    refused(["sample", "--checkpoint", checkpoint, "--device", "cuda", CAPTION], "cuda")
    assert not list(tmp_path.iterdir())


def test_of_several_processes_without_a_gpu_the_first_alone_speaks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("RANK", "0")):
        monkeypatch.setenv(name, value)
    refused(["--preset", "tiny", "--device", "cuda"], "cuda")
    refused(["--preset", "tiny", "--device", "cpu"], "do not find each other", "MASTER_ADDR")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as refusal:
        train.main(["--preset", "tiny", "--device", "cuda"])
    assert refusal.value.code == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rank", ["0", "3", "of a cluster"])
def test_a_rank_that_another_program_has_set_is_none(monkeypatch, rank):
    monkeypatch.setenv("RANK", rank)
    machine.join_the_others("cpu")
    assert machine.rank() == 0 and machine.processes() == 1


def test_more_processes_than_images_are_refused_before_the_first_step(tmp_path, monkeypatch):
    run = train.Run(settings(batch=3, tuples=1))
    monkeypatch.setattr(machine, "processes", lambda: 3)
    machine.check_shares(run)                                      # the twin
    monkeypatch.setattr(machine, "processes", lambda: 4)
    with pytest.raises(SystemExit, match="a step of 3 images has none for some of the 4"):
        train.train(run, tmp_path)
    run.step = run.settings.pretrain_steps                         # no batch of the pretraining
    run.plan = [(torch.arange(6), torch.ones(6))]
    machine.check_shares(run)


def test_a_process_that_loses_the_others_says_so_and_no_more(monkeypatch):
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:1")
    monkeypatch.setattr(machine.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(machine.dist, "get_rank", lambda: 1)
    with pytest.raises(SystemExit) as ending, book.one_sentence():
        raise lost
    assert ending.value.code == 1                                  # the first process speaks
    monkeypatch.setattr(machine.dist, "get_rank", lambda: 0)
    with pytest.raises(SystemExit, match="another process of the run has ended"):
        with book.one_sentence():
            raise lost
    monkeypatch.setattr(machine.dist, "is_initialized", lambda: False)
    with pytest.raises(RuntimeError, match="closed by peer"), book.one_sentence():
        raise lost                                                 # the twin: it was alone


def test_a_folder_in_use_is_not_touched(tmp_path, finished):
    before = contents(finished)
    refused(tiny(finished), "not empty", "--resume", "--out")
    assert contents(finished) == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine", encoding="utf-8")
    refused(tiny(other), "not empty")
    refused(tiny(other, "--resume"), "checkpoint.pt cannot be read")
    assert contents(other) == {"thesis.txt": b"mine"}
    refused(tiny(tmp_path / "absent", "--resume"), "checkpoint.pt cannot be read")
    assert list(tmp_path.iterdir()) == [other]


@pytest.mark.parametrize("typed, named", [
    ("--seed 1", "--seed 0, not 1"),
    ("--model unet", "--model dit, not unet"),
    ("--preset cpu", ", not "),
    ("--preset gpu --device cpu", ", not "),
    # What a preset decides counts as asked for: this one's images are larger.
    ("--preset tiny --pixels 24", "--pixels 8, not 24"),
    ("--finetune_steps 8", "--finetune_steps 4, not 8")])
def test_a_resume_that_asks_for_another_run_is_refused(finished, typed, named):
    before = contents(finished)
    refused(["--out", finished, "--resume", *typed.split()], named)
    assert contents(finished) == before


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine", encoding="utf-8")
    refused(tiny(file), "file")
    refused(tiny(file / "below"), "file")
    refused(tiny("/proc/none"), "/proc/none")
    assert contents(tmp_path) == {"file": b"mine"}


def truncated(good):
    return good[:len(good) // 2]


def with_a_bit_flipped(good):
    """In the middle of the largest tensor, where torch.load notices nothing."""
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        tensors = [record for record in archive.infolist() if "/data/" in record.filename]
        largest = max(tensors, key=lambda record: record.file_size)
    damaged = bytearray(good)
    damaged[largest.header_offset + largest.file_size // 2] ^= 1
    torch.load(io.BytesIO(damaged), weights_only=True)
    return bytes(damaged)


DAMAGED = {"truncated": truncated, "bit": with_a_bit_flipped, "empty": lambda good: b"",
           "text": lambda good: b"hello\n"}
FOREIGN = {"foreign": {"model": 1}, "tensor": torch.zeros(2),
           "fields": {"format": train.FORMAT, "settings": {}},
           "no settings": {"format": train.FORMAT},
           "version": {"format": train.FORMAT, "settings": {"batches": 4}},
           "older": {"format": "quadratic geometry of flow matching 2", "settings": {}},
           "halves": {"format": train.FORMAT, "settings": {}, "model": {}, "ema": {}}}


PIPE = ["pipe"] if hasattr(os, "mkfifo") else []                   # not on Windows


@pytest.mark.parametrize("kind", ["missing", "folder", *PIPE, *DAMAGED, *FOREIGN])
def test_bad_checkpoints_are_named(tmp_path, finished, kind):
    file = tmp_path / "checkpoint.pt"
    if kind in DAMAGED:
        good = (finished / "checkpoint.pt").read_bytes()
        file.write_bytes(DAMAGED[kind](good))
    elif kind in FOREIGN:
        torch.save(FOREIGN[kind], file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "pipe":                                           # nobody will write into it
        os.mkfifo(file)
    before = list(tmp_path.iterdir())
    picture = tmp_path / "out.png"
    refused(["sample", "--checkpoint", file, "--out", picture, CAPTION], "checkpoint.pt")
    refused(["--resume", "--out", tmp_path], "checkpoint.pt")
    refused(tiny(tmp_path / "new", "--init", file), "checkpoint.pt")
    assert list(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name, value", [
    ("step", None), ("log", None), ("generator", None), ("optimizer", None), ("loss", "x"),
    ("optimizer", {}), ("model", {}), ("generator", torch.zeros(3))])
def test_a_checkpoint_that_was_changed_is_no_traceback(tmp_path, finished, name, value):
    """None is for what is missing."""
    content = checkpoint(finished / "checkpoint.pt")
    content[name] = value
    if value is None:
        del content[name]
    torch.save(content, tmp_path / "checkpoint.pt")
    refused(["--resume", "--out", tmp_path], "checkpoint")


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path, finished):
    file, picture = finished / "pretrained.pt", tmp_path / "x.png"
    sample = ["sample", "--checkpoint", file, "--out", picture]
    refused([*sample, "--model", "unet", CAPTION], "--model dit, not unet")
    refused(tiny(tmp_path / "new", "--model", "unet", "--init", file), "--model dit, not unet")
    refused(tiny(tmp_path / "new", "--width", 48, "--init", file), "--width 24, not 48")
    assert not list(tmp_path.iterdir())


# --- A run's folder has one owner -----------------------------------------------------------------

def asleep(arguments, step, awake):
    """The work of a process of its own: a run that falls asleep after a step."""
    def sleep():
        awake.touch()
        while True:
            signal.pause()

    with after_step(step, sleep):
        train.main(arguments)


def test_a_second_run_in_a_folder_is_refused_and_a_kill_frees_it(tmp_path, processes, finished,
                                                                 only_training):
    folder, awake = tmp_path / "run", tmp_path / "awake"
    first = processes.start(asleep, tiny(folder), 5, awake)
    try:
        while not awake.exists():
            assert first.is_alive()
            time.sleep(0.01)
        before = contents(folder)
        refused(tiny(folder, "--resume"), "another run is at work in", "--out")
        refused(tiny(folder), str(folder))
        assert contents(folder) == before
    finally:
        first.kill()
        first.join()
    train.main(tiny(folder, "--resume"))
    assert not_as(folder, finished) == []


def test_of_two_runs_that_start_at_once_the_second_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    with book.owned(folder):
        refused(tiny(folder), "another run is at work in", str(folder))
    assert not list(folder.iterdir())

    # The first may save and end between the second's look into the folder and its lock.
    new_run = train.new_run

    def slow(s, folder):
        run = new_run(s, folder)
        Path(folder, "checkpoint.pt").write_bytes(b"of the first")
        return run

    monkeypatch.setattr(train, "new_run", slow)
    refused(tiny(folder), "not empty")
    assert contents(folder) == {"checkpoint.pt": b"of the first"}


def test_without_the_lock_of_the_operating_system_two_would_own_a_folder(tmp_path, monkeypatch):
    """The twin: it is the lock that refuses."""
    with book.owned(tmp_path):
        with pytest.raises(SystemExit, match="another run"), book.owned(tmp_path):
            pass
        monkeypatch.setattr(book.fcntl, "flock", nothing)
        with book.owned(tmp_path):
            pass


def test_a_folder_is_free_again_after_a_refusal(tmp_path):
    with pytest.raises(SystemExit), book.owned(tmp_path):
        book.stop("whatever it is")
    with book.owned(tmp_path):
        pass


# --- The last stage never throws away the first ---------------------------------------------------

@pytest.fixture
def quick_report(monkeypatch, finished):
    """What a report measures is taken from the finished run, and its pictures are blank."""
    rows = report_of(finished)["rows"]

    def evaluate(model, s, roots, domain, split, view):
        place = {"domain": domain, "split": split, "view": view}
        return next(row for row in rows if row.items() >= place.items())

    def savefig(figure, file, **_):
        Path(file).write_bytes(b"a picture")

    monkeypatch.setattr(report, "evaluate", evaluate)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)


@pytest.mark.parametrize("name", ["samples", "curves", "probe"])
def test_a_picture_that_fails_leaves_the_report_whole_and_says_so(tmp_path, capsys, monkeypatch,
                                                                  finished, quick_report, name):
    def failing(*_):
        raise ValueError("no font\nof many lines")

    def blank(*arguments):
        Path(arguments[-1]).write_bytes(b"a picture")

    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "report.json").unlink()
    others = {"samples", "curves", "probe"} - {name}
    for other in others:
        monkeypatch.setattr(pictures, f"draw_{other}", blank)
    monkeypatch.setattr(pictures, f"draw_{name}", failing)
    assert train.main(tiny(folder, "--resume")) is None
    said = [line for line in capsys.readouterr().out.splitlines() if "no font" in line]
    assert len(said) == 1 and f"{name}.png" in said[0]
    assert report_of(folder)["rows"]
    assert all((folder / f"{other}.png").read_bytes() == b"a picture" for other in others)


def test_an_evaluation_without_a_step_of_fine_tuning_has_its_report(tmp_path, finished,
                                                                    quick_report):
    folder = tmp_path / "run"
    flags = ["--init", finished / "pretrained.pt", "--finetune_steps", 0, "--probe", 0]
    assert train.main(tiny(folder, *flags)) is None
    written = {"checkpoint.pt", "pretrained.pt", "log.csv", "report.json", "samples.png"}
    assert set(contents(folder)) == written
    assert rows(folder) == []


def test_what_the_report_needs_is_looked_at_before_the_first_step(tmp_path, half_way, monkeypatch):
    """A resumed run whose pretrained.pt is lost, or damaged."""
    steps = []
    monkeypatch.setattr(train.Run, "train_step", steps.append)
    for name, damage in (("lost", None), ("damaged", truncated)):
        folder = tmp_path / name
        shutil.copytree(half_way, folder)
        file = folder / "pretrained.pt"
        good = file.read_bytes()
        file.unlink()
        if damage:
            file.write_bytes(damage(good))
        refused(tiny(folder, "--resume"), "pretrained.pt")
    assert not steps


def test_fine_tuning_can_start_from_a_pretrained_checkpoint(tmp_path, finished, only_training):
    folder = tmp_path / "run"
    train.main(tiny(folder, "--init", finished / "pretrained.pt"))
    assert [row["phase"] for row in rows(folder)] == ["finetune"] * 2
    ours, theirs = (checkpoint(run / "pretrained.pt")["ema"] for run in (folder, finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_foreign_package_of_the_name_results_or_support_costs_no_work(tmp_path, monkeypatch,
                                                                        finished, quick_report):
    """Earlier on the path than ours: either it does not matter, or the import fails at once."""
    for name in ("results", "support"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("", encoding="utf-8")
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "results", raising=False)
    assert train.main(tiny(folder, "--resume")) is None

    ours = [name for name in sys.modules if name.split(".")[0] in ("train", "support")]
    for name in ours:
        monkeypatch.delitem(sys.modules, name)
    try:
        importlib.import_module("train")
    except ImportError as error:
        assert "support" in str(error)


def program(*arguments, **environment):
    """train.py in a process of its own: its exit status, and what it printed."""
    command = [sys.executable, ROOT / "train.py", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, env=environment, encoding="utf-8", errors="replace",
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.returncode, done.stdout


HOSTILE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
           "MPLBACKEND": "of no kind that matplotlib knows"}


def torchrun(arguments, environment, printed):
    """The work of a process of its own: what the command torchrun does, its words in a file."""
    from torch.distributed.run import main
    with open(printed, "wb") as stream:
        for output in (1, 2):
            os.dup2(stream.fileno(), output)
    os.environ |= {"OMP_NUM_THREADS": "1"} | environment
    main(["--standalone", "--nproc_per_node=1", str(ROOT / "train.py"), *arguments])


def test_a_hostile_environment_costs_nothing(tmp_path, processes):
    """A notebook's backend, an ASCII locale, a folder of other letters, packages of our names.

    torchrun starts the program, as it would on a machine with one GPU.
    """
    for name in ("results", "support", "train"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('foreign')", encoding="utf-8")
    folder, printed = tmp_path / "r\u00fcn \u65e5", tmp_path / "printed"
    steps = ["--pretrain_steps", 1, "--finetune_steps", 1, "--eval_images", 2, "--probe", 0]
    environment = HOSTILE | {"PYTHONPATH": str(tmp_path)}
    process = processes.start(torchrun, tiny(folder, *steps), environment, printed)
    status = processes.status_of(process)
    assert status == 0, printed.read_text(encoding="utf-8")
    assert {"report.json", "samples.png", "curves.png"} <= set(contents(folder))


def test_a_refusal_of_the_script_is_its_exit(tmp_path, monkeypatch):
    """Python prints the sentence of a SystemExit, and its exit status is 1."""
    monkeypatch.setattr(sys, "argv", ["train.py", *tiny(tmp_path / "run", "--batch", 0)])
    with pytest.raises(SystemExit, match="train.py: --batch must be from 1"):
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


STAND_IN = """
import os, signal, time
print("waits", os.environ["OMP_WAIT_POLICY"], os.environ.get("GOMP_SPINCOUNT"), flush=True)
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
except BaseException:
    print("torch goes on without one of its libraries")
"""


@pytest.mark.parametrize("chosen, waits", [({}, "passive 1000"),
                                           ({"GOMP_SPINCOUNT": "7"}, "passive 7"),
                                           ({"OMP_WAIT_POLICY": "active"}, "active None")])
def test_an_interrupt_during_the_imports_is_no_traceback(tmp_path, monkeypatch, chosen, waits):
    """A stand-in for torch is interrupted while it is loaded. It knows how threads shall wait.

    Like torch it goes on after an exception in a part of itself.
    """
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "torch.py").write_text(STAND_IN, encoding="utf-8")
    status, said = program(*tiny(tmp_path / "run"), PYTHONPATH=str(tmp_path), **chosen)
    assert status != 0
    assert "Traceback" not in said and "goes on" not in said
    assert said.endswith("train.py: interrupted before anything was begun\n")
    assert f"waits {waits}\n" in said


# --- The report, the log and the probe ------------------------------------------------------------

def test_the_report_holds_what_it_promises(finished):
    assert set(contents(finished)) == {"log.csv", "probe.jsonl", "checkpoint.pt", "pretrained.pt",
                                       "report.json", "samples.png", "curves.png", "probe.png"}
    for name in ("samples.png", "curves.png", "probe.png"):
        picture = (finished / name).read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    found = report_of(finished)
    assert found["settings"] == checkpoint(finished / "checkpoint.pt")["settings"]
    places = []
    for row in found["rows"]:
        places.append((row["model"], row["domain"], row["split"], row["view"]))
        assert row["ceiling"] == 1 and row["error"] > 0 and row["floor"] > 0
        low, high = row["interval"]
        assert low <= row["joint"] <= high
        # Eq. 5 holds over the population, and over few images nearly.
        assert row["loss"] == pytest.approx(row["error"] + row["floor"], rel=0.05)
    views = ("macro", "meso", "micro")
    splits = ("seen", "held_out")
    expected = [("pretrained", "base", split, view) for split in splits for view in views]
    expected += [("fine-tuned", "target", split, view) for split in splits for view in views]
    assert places == expected


def test_the_log_has_a_row_every_few_steps_and_the_columns_of_its_phase(finished):
    with open(finished / "log.csv", encoding="utf-8") as stream:
        assert next(csv.reader(stream)) == report.COLUMNS
    log = rows(finished)
    assert [int(row["step"]) for row in log] == [4, 6, 8, 10]
    assert [row["phase"] for row in log] == ["pretrain", "pretrain", "finetune", "finetune"]
    for row in log:
        assert float(row["loss"]) > 0 and float(row["grad_norm"]) > 0 and float(row["lr"]) > 0
        for measure in ("loss", "error", "floor"):
            for view in ("macro", "meso", "micro"):
                assert float(row[f"val_{measure}_{view}"]) > 0
    # Four images in a step of the pretraining, two tuples of three views after it.
    assert [int(row["images"]) for row in log] == [16, 24, 36, 48]


def test_the_loss_of_the_log_is_a_running_mean_of_the_steps_losses(tmp_path, monkeypatch,
                                                                   only_training):
    losses = []
    deferred_backward = sga.deferred_backward

    def noted(*arguments):
        losses.append(deferred_backward(*arguments))
        return losses[-1]

    monkeypatch.setattr(sga, "deferred_backward", noted)
    folder = tmp_path / "run"
    train.main(tiny(folder, "--probe", 0))
    mean = losses[0].item()
    for step, loss in enumerate(losses[1:], 2):
        mean += 0.02 * (loss.item() - mean)
    assert float(rows(folder)[-1]["loss"]) == pytest.approx(mean, rel=1e-5)


def test_a_probe_goes_on_in_float64_where_float32_has_too_few_digits(monkeypatch):
    torch.manual_seed(0)
    layer, x, r = torch.nn.Linear(4, 2), torch.randn(3, 4), torch.randn(3, 2)
    second = (torch.randn(5, 4),), torch.randn(5, 2)
    M = report.interaction_matrix_of(layer, (x,), r)
    between = report.interaction_matrix_of(layer, (x,), r, second)     # (3, 5)
    original, refused = ntk.fast_interaction_matrix, []

    def only_in_float64(model, inputs, vectors, columns):
        if vectors.dtype == torch.float32:
            refused.append(vectors)
            raise ValueError("too few digits")
        return original(model, inputs, vectors, columns)

    monkeypatch.setattr(ntk, "fast_interaction_matrix", only_in_float64)
    again = report.interaction_matrix_of(layer, (x,), r)
    assert refused and again.dtype == layer.weight.dtype == torch.float32
    assert torch.allclose(again, M, rtol=1e-5)
    again = report.interaction_matrix_of(layer, (x,), r, second)
    assert torch.allclose(again, between, rtol=1e-5) and again.shape == (3, 5)


def test_a_probe_changes_nothing_of_a_run(tmp_path, finished, only_training):
    folder = tmp_path / "run"
    train.main(tiny(folder, "--probe", 0))
    for name in ("checkpoint.pt", "pretrained.pt"):
        found = differing(folder / name, finished / name)
        assert {path.split("/")[1] for path in found} == {"settings", "probe"}
        assert [path for path in found if "settings" in path] == ["/settings/probe"]
    assert rows(folder) == rows(finished)
    assert not (folder / "probe.jsonl").exists()


def test_the_probe_has_a_row_before_the_first_step_and_one_beside_each_of_the_log(finished):
    probe = book.read_probe(finished)
    assert [row["step"] for row in probe] == [0, 4, 6, 8, 10]
    assert probe[0]["drift"] == 0
    # At the start the DiT's head is 0, and so is every gradient before it.
    assert all(row["drift"] > 0 for row in probe[1:])
    assert all(len(row["M"]) == 18 for row in probe)


@pytest.mark.parametrize("model, roots", [("dit", 2), ("unet", 1)])
def test_the_probe_is_that_of_the_clear_route_at_the_runs_own_weights(model, roots):
    run = train.Run(settings(model=model))
    for _ in range(3):
        run.train_step()
    inputs, u, labels = batch = report.probe_batch(run.settings, run.roots, roots)
    row = report.probe_row(run.model, batch, [])

    # In double precision, and by vector-Jacobian products of one sample at a time.
    x_t, t, tokens = inputs
    inputs = (x_t.double(), t.double(), tokens)
    network = run.model.double()
    f, params = ntk.of_module(network)
    with torch.no_grad():
        r = network(*inputs) - u
    M = ntk.interaction_matrix(f, params, inputs, r)
    scale = M.abs().max().item()
    precision = 1e4 * torch.finfo(torch.float32).eps * scale
    assert torch.allclose(row["M"].double(), M, rtol=0, atol=precision)
    velocity = -M.sum().item() / len(M) ** 2
    assert row["trace"] + row["cross"] == pytest.approx(velocity, abs=precision)
    assert row["drift"] == 0


def test_the_kinds_of_pairs_are_counted_by_what_they_share():
    # The gradients of two roots, each at two noise levels.
    gradients = [(1.0, 0.0), (-1.0, 0.1), (1.0, 0.2), (0.5, -2.0)]
    root, view, level = [0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]
    g = torch.tensor(gradients)
    labels = torch.tensor([root, view, level]).T
    found = ntk.pairs_by_kind(g @ g.T, labels, ("root", "view", "level"))
    conflicts = {kind: values["conflict"] for kind, values in found.items()}
    assert conflicts == {"root view": 0.5, "view level": 0.5, "view": 0.5}
    same_level = torch.cosine_similarity(g[:2], g[2:])
    expected = same_level.mean().item()
    assert found["view level"]["cosine"] == pytest.approx(expected)


def test_the_cover_is_drawn(tmp_path, finished):
    path = ROOT / "results/cover.py"
    spec = importlib.util.spec_from_file_location("cover", path)
    cover = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cover)
    cover.main(str(finished), str(tmp_path / "cover.png"))
    assert (tmp_path / "cover.png").stat().st_size > 10_000


def test_wilson_intervals_are_the_known_ones():
    assert report.wilson(0.0, 10) == pytest.approx([0.0, 0.2775], abs=1e-4)
    assert report.wilson(0.5, 10) == pytest.approx([0.2366, 0.7634], abs=1e-4)
    assert report.wilson(0.9, 100) == pytest.approx([0.8256, 0.9448], abs=1e-4)


def test_help_explains_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit) as leaving:
        train.main(["--help"])
    assert not leaving.value.code
    text = " ".join(capsys.readouterr().out.split())
    fields = dataclasses.fields(train.Settings)
    for field in fields:
        start = field.metadata["help"].split(",")[0][:40]
        assert f"--{field.name} " in text and start in text
    assert text.count("default") >= len(fields)


# --- Drawing what is typed ------------------------------------------------------------------------

def sample(finished, file, *more):
    """The arguments that draw what is typed into a file."""
    start = ["sample", "--checkpoint", finished / "checkpoint.pt", "--device", "cpu"]
    return [str(argument) for argument in [*start, "--out", file, *more]]


def test_sample_draws_what_is_typed_and_names_the_file(tmp_path, capsys, finished):
    file = tmp_path / "drawn.png"
    assert train.main(sample(finished, file, CAPTION, "meso blue plain cross on grey")) is None
    assert file.read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and str(file) in said[0]


def test_a_picture_without_a_suffix_is_named_as_it_is_written(tmp_path, capsys, finished):
    assert train.main(sample(finished, tmp_path / "drawn", CAPTION)) is None
    [file] = tmp_path.iterdir()
    assert file.read_bytes().startswith(b"\x89PNG")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(str(file))


@pytest.mark.parametrize("name", ["drawn.xyz", "drawn.png.zip", "drawn.", "drawn.pgf"])
def test_a_picture_of_an_unknown_kind_is_refused_before_the_work(tmp_path, monkeypatch, finished,
                                                                 name):
    sampled = []
    monkeypatch.setattr(fm, "sample", lambda *arguments: sampled.append(arguments))
    refused(sample(finished, tmp_path / name, CAPTION), name, "png")
    refused(sample(finished, "", CAPTION), "--out ''", "png")
    assert not sampled
    assert not list(tmp_path.iterdir())


def test_a_picture_that_has_no_place_is_refused_before_the_work(tmp_path, monkeypatch, finished):
    monkeypatch.setattr(fm, "sample", Wanting(AssertionError("the work")))
    refused(sample(finished, tmp_path / "absent/drawn.png", CAPTION), "no folder", "absent")
    assert not list(tmp_path.iterdir())
    (tmp_path / "drawn.png").mkdir()
    refused(sample(finished, tmp_path / "drawn.png", CAPTION), "drawn.png", "is a folder")
    with pytest.raises(AssertionError, match="the work"):          # the twin
        train.main(sample(finished, tmp_path / "other.png", CAPTION))


@pytest.mark.parametrize("error, said", [
    (RuntimeError("latex could not be found\nmore"), "drawn.png could not be drawn (latex could"),
    (OSError(28, "No space left on device"), "drawn.png cannot be read or written: No space"),
    (KeyboardInterrupt(), "interrupted; what was saved is whole")])
def test_a_typed_caption_that_cannot_be_drawn_is_one_sentence(tmp_path, monkeypatch, finished,
                                                              error, said):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", Wanting(error))
    refused(sample(finished, tmp_path / "drawn.png", CAPTION), said)
    assert not list(tmp_path.iterdir())


def test_letters_that_a_terminal_does_not_know_are_no_traceback(tmp_path, monkeypatch, finished,
                                                                quick_drawing):
    file = tmp_path / "\u65e5 \u00fc.png"
    for _ in range(2):
        terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", terminal)
        train.main(sample(finished, file, CAPTION))
        terminal.flush()
        said = terminal.buffer.getvalue().decode("ascii")
        assert "four samples" in said and "\\u65e5 \\xfc.png" in said
    assert file.exists()
    with pytest.raises(UnicodeEncodeError):                        # the twin: no change of it
        io.TextIOWrapper(io.BytesIO(), encoding="ascii").write(str(file))


def test_a_caption_with_an_unknown_word_is_refused(tmp_path, finished):
    typed = [CAPTION, "macro purple circle"]
    refused(sample(finished, tmp_path / "x.png", *typed), "purple", "red")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def quick_drawing(monkeypatch):
    """Samples are noise and their picture is blank."""
    def noise(model, tokens, s, generator):
        return torch.zeros(len(tokens), 3, s.pixels, s.pixels)

    def blank(captions, images, file):
        Path(file).write_bytes(b"a picture")

    monkeypatch.setattr(report, "sample_images", noise)
    monkeypatch.setattr(pictures, "draw_captions", blank)


@pytest.mark.parametrize("caption, named", [
    ("macro red on white", "texture"),
    ("meso red plain circle top left on white", "top"),
    ("micro red striped circle on white", "circle"),
    ("red striped circle on white", "macro")])
def test_a_caption_outside_the_grammar_is_not_drawn_without_a_word(tmp_path, capsys, finished,
                                                                   quick_drawing, caption, named):
    """It is refused, or drawn with a sentence that says what is wrong."""
    try:
        train.main(sample(finished, tmp_path / "x.png", caption))
        said = capsys.readouterr().out.splitlines()[0]
    except SystemExit as refusal:
        said = refusal.code
    assert repr(caption) in said and named in said


def test_a_caption_of_the_grammar_is_drawn_without_a_warning(tmp_path, capsys, finished,
                                                             quick_drawing):
    """The twin of the two tests around it."""
    train.main(sample(finished, tmp_path / "x.png", CAPTION, "micro red plain on grey"))
    assert len(capsys.readouterr().out.splitlines()) == 1


def with_settings(folder, source, **changes):
    """A folder with the checkpoint of a run that has other settings."""
    content = checkpoint(source)
    content["settings"] |= changes
    folder.mkdir(exist_ok=True)
    torch.save(content, folder / "checkpoint.pt")
    return folder


PAIR = "macro red plain circle left of blue plain square on grey"
ONLY_WHOLE = {"pretrain_views": "macro", "arm": "whole"}


@pytest.mark.parametrize("name, changes, caption, named", [
    # A caption of the grammar that this network was not taught, and one that it was.
    ("checkpoint", {}, PAIR, "objects: 2"),
    ("checkpoint", {"objects": 2}, PAIR, ""),
    ("checkpoint", {"objects": 2}, CAPTION, "objects: 1"),
    ("checkpoint", {}, "meso red dotted cross on cyan", ""),
    ("pretrained", {}, "meso red plain cross on white", "the word 'cross'"),
    ("pretrained", {}, "micro red dotted on white", "the word 'dotted'"),
    ("pretrained", {}, "micro red plain on cyan", "the word 'cyan'"),
    ("pretrained", {}, "micro red plain on white", ""),
    ("pretrained", {"pretrain_views": "macro"}, "micro red plain on white", "is micro"),
    ("checkpoint", {"pretrain_views": "macro"}, "micro red plain on grey", ""),
    ("checkpoint", {}, "micro red plain on white", "the word 'white', and no image of the fine"),
    ("checkpoint", ONLY_WHOLE, "meso red plain cross on cyan", "is meso"),
    ("checkpoint", ONLY_WHOLE, "macro red plain cross top left on cyan", ""),
    # The null caption is taught by dropping captions, and if all are dropped it alone is.
    ("checkpoint", {}, "", ""),
    ("checkpoint", {"caption_dropout": 0.0, "guidance": 1.0}, "", "null caption was never"),
    ("checkpoint", {"caption_dropout": 1.0}, CAPTION, "no caption was ever trained")])
def test_what_a_network_was_never_taught_is_said(tmp_path, capsys, finished, quick_drawing, name,
                                                 changes, caption, named):
    folder = with_settings(tmp_path, finished / f"{name}.pt", **changes)
    train.main(sample(folder, tmp_path / "x.png", caption))
    said = capsys.readouterr().out
    assert named in said
    assert len(said.splitlines()) == (2 if named else 1)


def test_guidance_without_a_null_caption_in_the_training_warns(tmp_path, capsys, finished,
                                                               quick_drawing):
    with_settings(tmp_path, finished / "checkpoint.pt", caption_dropout=0.0)
    train.main(sample(tmp_path, tmp_path / "x.png", CAPTION))
    assert "null caption was never trained" in capsys.readouterr().out
    train.main(sample(tmp_path, tmp_path / "x.png", CAPTION, "--guidance", 1))
    assert "never trained" not in capsys.readouterr().out


def test_a_run_with_guidance_and_without_a_null_caption_warns_before_the_first_step(
        tmp_path, capsys, only_training):
    train.main(tiny(tmp_path / "run", "--caption_dropout", 0, "--probe", 0))
    before_the_steps = capsys.readouterr().out.split("step 4/")[0]
    assert "null caption" in before_the_steps


# --- Validation and batches -----------------------------------------------------------------------

def test_validation_is_zero_error_for_the_exact_velocity():
    s = settings(eval_images=16)
    held = report.validation_set(s, train.Run(s).roots, "base", "seen", "macro")
    u_star = held[-1]

    def exact(x, t, tokens):
        return u_star

    def wrong(x, t, tokens):
        return u_star + 0.5

    found = report.validate(exact, held, s)
    assert found["error"] == 0 and found["loss"] == found["floor"] > 0
    twin = report.validate(wrong, held, s)
    assert twin["error"] == pytest.approx(0.25) and twin["floor"] == found["floor"]


def test_validation_is_at_evenly_spread_noise_levels():
    s = settings(eval_images=12)
    t = report.validation_set(s, None, "base", "seen", "macro")[2]
    expected = (2 * torch.arange(12) + 1) / 24
    assert torch.allclose(t, expected)


def told(scenes, granularity="macro"):
    """The different captions of scenes."""
    return set(toy_data.captions(scenes, granularity))


def test_seen_captions_of_the_target_are_those_of_the_roots():
    s = settings(roots=5, eval_images=20)
    roots = train.Run(s).roots
    seen = report.test_scenes(s, roots, "target", "seen", 4)
    held_out = report.test_scenes(s, roots, "target", "held_out", 4)
    assert told(seen) == told(roots)
    assert not told(held_out) & told(roots)


def finetuning(**more):
    """A Run at the beginning of its fine-tuning."""
    run = train.Run(settings(caption_dropout=0.0, **more))
    run.begin_finetuning()
    return run


def first_batch(run):
    return train.draw_batch(run, run.settings.pretrain_steps + 1)


def test_fine_tuning_sees_only_the_roots_at_three_granularities():
    run = finetuning(tuples=100, finetune_steps=1)
    x0, e, t, tokens, a = first_batch(run)
    texts = {" ".join(toy_data.WORDS[k] for k in row if k) for row in tokens.tolist()}
    expected = set()
    for view in toy_data.GRANULARITIES:
        expected |= told(run.roots, view)
    assert texts == expected
    assert len(x0.flatten(1).unique(dim=0)) <= 3 * run.settings.roots
    assert len(e.flatten(1).unique(dim=0)) == 300


def test_pretraining_sees_new_whole_scenes_in_every_step():
    run = train.Run(settings(caption_dropout=0.0, batch=50, pretrain_views="macro"))
    first, second = train.draw_batch(run, 1), train.draw_batch(run, 2)
    assert not torch.equal(first[0], second[0])
    macro = toy_data.WORDS.index("macro")
    _, _, _, tokens, a = first
    assert (tokens[:, 0] == macro).all()
    assert (a == 1 / 50).all()


def test_half_of_the_views_of_a_pretraining_on_all_views_are_macro():
    run = train.Run(settings(caption_dropout=0.0, batch=4000))
    first_words = train.draw_batch(run, 1)[3][:, 0]
    for view, expected in (("macro", 1 / 2), ("meso", 1 / 4), ("micro", 1 / 4)):
        found = (first_words == toy_data.WORDS.index(view)).double().mean().item()
        # Five standard deviations of a share of 4000.
        assert found == pytest.approx(expected, abs=5 * (expected * (1 - expected) / 4000)**0.5)


def test_captions_are_dropped_sample_by_sample():
    s = settings(batch=4000, caption_dropout=0.25)
    tokens = train.draw_batch(train.Run(s), 1)[3]
    dropped = (tokens == 0).all(1).double()
    # Within four standard errors of a share of 4000.
    assert abs(dropped.mean() - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5


# --- The arms -------------------------------------------------------------------------------------

PLANS = {"roots": 10, "tuples": 4, "finetune_steps": 30, "smallest_object": 0.24}


def planned(arm, **more):
    return train.Run(settings(arm=arm, **PLANS | more))


def sizes_of(run):
    """The number of views in each step of the fine-tuning."""
    return [len(views) for views, _ in run.plan]


@pytest.fixture(scope="module")
def baseline():
    """The baseline's plan, and a twin whose tuples have other sizes, since its roots differ."""
    return planned("baseline"), planned("baseline", seed=1)


@pytest.mark.parametrize("arm", [arm for arm in sga.ARMS if arm not in ("big", "baseline")])
def test_every_arm_has_the_images_and_the_steps_of_the_baseline(arm, baseline):
    run = planned(arm)
    sizes = sizes_of(run)
    assert len(set(sizes)) > 1                                     # tuples of two and three views
    assert sizes == sizes_of(baseline[0]) != sizes_of(baseline[1])
    pretraining = report.images_until(run, run.settings.pretrain_steps)
    assert report.images_until(run, run.last) - pretraining == sum(sizes)
    for views, a in run.plan:
        assert len(views) == len(a)
        if run.arm.weigh == "view":
            assert torch.allclose(a.double(), torch.tensor(1 / 12).double())
        else:
            assert a.sum().item() == pytest.approx(1)
        if arm == "whole":
            assert (run.granularity[views] == 0).all()


def test_the_big_arm_has_the_images_of_the_baseline_in_a_third_of_the_steps(baseline):
    big, small = planned("big"), baseline[0]
    assert (len(big.plan), len(small.plan)) == (10, 30)
    assert report.images_until(big, big.last) == report.images_until(small, small.last)
    views = [torch.cat([views for views, _ in run.plan]) for run in (big, small)]
    assert torch.equal(*views)
    assert all(a.sum().item() == pytest.approx(1) for _, a in big.plan)
    rate = train.learning_rate(big, big.settings.pretrain_steps + 10)
    assert rate == pytest.approx(0.1 * big.settings.finetune_lr)


def tuples_of(run):
    """The roots and the granularities of each tuple that a plan puts together."""
    for views, a in run.plan:
        start = 0
        while start < len(views):
            # With four tuples in a step, the weight of a view in a tuple of K is 1 / (4 K).
            K = max(1, round(1 / (4 * a[start].item())))
            met = views[start:start + K]
            yield run.root[met].tolist(), run.granularity[met].tolist()
            start += K


def test_who_meets_in_a_tuple():
    run = planned("tuple")
    sizes = run.root.bincount().tolist()
    for roots, kinds in tuples_of(run):
        assert roots == [roots[0]] * sizes[roots[0]] and len(set(kinds)) == len(kinds)

    stratified = list(tuples_of(planned("stratified")))
    assert all(kinds == list(range(len(kinds))) for _, kinds in stratified)
    assert sum(len(set(roots)) == 1 for roots, _ in stratified) < 30

    random = list(tuples_of(planned("random")))
    assert sum(kinds != list(range(len(kinds))) for _, kinds in random) > 60


def levels(arm):
    """The noise levels (n,) of a large step of an arm, and each one's granularity (n,)."""
    run = finetuning(arm=arm, **PLANS | {"tuples": 4000, "finetune_steps": 1, "time_mean": 0.5})
    _, _, t, _, _ = first_batch(run)
    return t, run.granularity[run.plan[0][0]]


def test_the_noise_levels_of_the_arms():
    def shifts(arm):
        t, granularity = levels(arm)
        z = torch.logit(t) - 0.5                                   # the settings' own mean
        means = [z[granularity == k].mean().item() for k in range(3)]
        return means, z.std().item()

    # About 4000 levels a granularity with a spread of 1: four standard errors of their mean.
    within = 4 / 3000**0.5
    (own, spread), (mixed, mixed_spread) = shifts("offsets"), shifts("global")
    assert own == pytest.approx([0.5, 0, -0.5], abs=within)
    assert shifts("flipped")[0] == pytest.approx([-0.5, 0, 0.5], abs=within)
    assert shifts("baseline")[0] == pytest.approx([0, 0, 0], abs=within)
    # The same levels in all as with the offsets, whatever the granularity.
    assert max(mixed) - min(mixed) < 2 * within
    assert mixed_spread == pytest.approx(spread, abs=within)


@pytest.mark.parametrize("model, arm, weighs", [
    ("dit", "min_snr", True), ("unet", "min_snr", True), ("unet", "sga", True),
    ("dit", "sga", False), ("unet", "baseline", False)])
def test_min_snr_weighs_the_loss_of_its_arms_alone(model, arm, weighs):
    """Eq. 20: the weight is 1 above the threshold of each granularity, and gamma / SNR below."""
    more = {"tuples": 400, "finetune_steps": 1, "time_mean": -1.0}
    run = finetuning(model=model, arm=arm, **PLANS | more)
    views, a_plan = run.plan[0]
    _, _, t, _, a = first_batch(run)
    t, ratio = t.double(), (a / a_plan).double()
    for granularity, gamma in enumerate((4, 5, 7)):
        own = run.granularity[views] == granularity
        capped = own & (t < 1 / (1 + gamma**0.5))
        assert capped.sum() > 20
        assert torch.allclose(ratio[own & ~capped], torch.ones(()).double())
        expected = gamma * (t[capped] / (1 - t[capped])) ** 2
        if not weighs:
            expected = torch.ones_like(expected)
        assert torch.allclose(ratio[capped], expected, rtol=1e-4)


def test_the_measured_arm_follows_its_matrix_and_survives_a_stop(tmp_path, only_training):
    """Its offsets are new at every row, and a run stopped between two goes on with those."""
    flags = ["--arm", "measured", "--roots", 2, "--probe", 1, "--pretrain_steps", 4,
             "--finetune_steps", 6, "--every", 2]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train.main(tiny(whole, *flags))
    offsets = [tuple(row["offsets"]) for row in book.read_probe(whole)]
    assert set(offsets[:3]) == {(0, 0, 0)}                         # none in the pretraining
    assert len(set(offsets[3:])) == 3

    run = train.resumed_run({}, whole)
    inputs, u, labels = report.probe_batch(run.settings, run.roots, 2)
    r = (run.model(*inputs) - u).detach()
    M = ntk.fast_interaction_matrix(run.model, inputs, r).detach()
    expected = sga.measured_offsets(M, labels[:, 1], inputs[1]).tolist()
    assert report.measured_offsets(run) == pytest.approx(expected, abs=1e-4)

    with after_step(7, interrupt):
        refused(tiny(stopped, *flags), "step 7 ")
    train.main(tiny(stopped, *flags, "--resume"))
    assert not_as(stopped, whole) == []


# --- The training ---------------------------------------------------------------------------------

def test_fine_tuning_begins_with_the_averaged_weights_and_a_new_optimizer():
    run = train.Run(settings())
    for _ in range(3):
        run.train_step()

    def as_the_average():
        pairs = zip(run.model.parameters(), run.ema.parameters())
        return all(torch.equal(weight, mean) for weight, mean in pairs)

    assert not as_the_average() and run.optimizer.state
    run.begin_finetuning()
    assert as_the_average() and not run.optimizer.state


def test_the_learning_rate_rises_and_falls_to_zero_in_each_phase():
    run = train.Run(settings(pretrain_steps=100, finetune_steps=50, warmup=10, lr=0.5,
                             finetune_lr=0.2))
    rates = [train.learning_rate(run, step) for step in range(1, 151)]
    for phase, peak in ((rates[:100], 0.5), (rates[100:], 0.2)):
        assert phase[0] == pytest.approx(peak / 10)
        assert max(phase) == pytest.approx(peak, rel=0.2) and max(phase) <= peak
        assert phase[-1] == pytest.approx(peak / len(phase))       # one more step, and it is 0
        assert all(a < b for a, b in zip(phase[:9], phase[1:9]))
        assert all(a > b for a, b in zip(phase[11:], phase[12:]))


def test_training_learns():
    """A few steps lower the error well below its start, that of predicting nothing."""
    run = train.Run(settings(width=48, pretrain_steps=80, batch=16, warmup=5, lr=0.01,
                             eval_images=32))
    held = report.validation_set(run.settings, run.roots, "base", "seen", "macro")
    before = report.validate(run.model, held, run.settings)["error"]
    for _ in range(80):
        run.train_step()
    after = report.validate(run.model, held, run.settings)["error"]
    assert after < 0.6 * before
