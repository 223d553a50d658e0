"""The commands for a GPU, rehearsed on a CPU: their clock, their changes, their rows, their end."""

import contextlib
import json
import time

import pytest
import torch

import train
from results import gpu
from support import machine


def rehearse(folder, *arguments):
    """The rows of one command at the tiny size, and its page."""
    with contextlib.suppress(SystemExit):
        gpu.main([*arguments, "--tiny", "--out", str(folder)])
    lines = (folder / "gpu.jsonl").read_text(encoding="utf-8").splitlines()
    page = (folder / "gpu.md").read_text(encoding="utf-8")
    return [json.loads(line)["row"] for line in lines], page


def test_the_rehearsal_leaves_rows_and_a_page(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "CAPTIONS", 8)
    races, _ = rehearse(tmp_path, "speedrun", "--model", "unet")
    assert [row["caches"] for row in races] == ["empty", "full", "full"]
    for row in races:
        assert row["reached"] and 0 < row["until the first step"] < row["seconds"]
        assert row["images"] == 2 * train.TINY["batch"]

    # On a CPU torch's code generator takes minutes.
    monkeypatch.setattr(torch, "compile", lambda network: network)
    rows, page = rehearse(tmp_path, "rates", "--model", "dit")
    assert rows[:3] == races and [row["change"] for row in rows[3:]] == list(gpu.CHANGES)
    assert rows[3]["times slower"] == rows[3]["least"] == rows[3]["most"] == 1
    assert all(row["least"] <= row["times slower"] <= row["most"] for row in rows[3:])
    for text in ("## speedrun, unet", "## rates, dit", "no GPU", gpu.cpu_model()):
        assert text in page


def test_the_clock_stops_at_the_evaluation_that_passes(monkeypatch):
    """A step takes 1 second and an evaluation 10; the reader's ceiling is 0.8, the goal 0.76."""
    now, found, step = [0.0], iter([0.8, 0.75, 0.77]), train.Run.train_step

    def slow_step(run):
        now[0] += 1
        return step(run)

    def slow_joint(images, scenes):
        now[0] += 10
        return next(found)

    monkeypatch.setattr(gpu, "clock", lambda s: now[0])
    monkeypatch.setattr(train.Run, "train_step", slow_step)
    monkeypatch.setattr(gpu, "joint", slow_joint)
    s = train.Settings(**train.TINY)
    row = gpu.race(s, goal=0.95, limit=1e9, captions=4)
    assert row["reached"] and (row["seconds"], row["evaluating"]) == (24, 20)
    assert (row["until the first step"], row["images"]) == (1, 4 * s.batch)


def facts(name, monkeypatch):
    """What is so while a run with a change is made and takes a step, and its weights after it."""
    found, flags = {"compiled": False}, gpu.argparse.Namespace(tiny=True, model="dit")

    def may_repeat(s):
        found["CUDA graph"] = bool(s.graph)
        return False

    def compile_nothing(network):
        found["compiled"] = True
        return network

    def look(network, inputs):
        found["bfloat16"] = torch.is_autocast_enabled("cpu")
        found["TF32"] = torch.get_float32_matmul_precision() == "high"

    changes, _ = gpu.CHANGES[name]
    preset = {"precision": "bfloat16", "graph": 1}
    monkeypatch.setattr(machine, "may_repeat", may_repeat)
    monkeypatch.setattr(torch, "compile", compile_nothing)
    with gpu.standing_in(name):
        s = gpu.settings_of(flags, **preset | changes)
        run = gpu.new_run(s)
    run.model.register_forward_pre_hook(look)
    gpu.seconds_of_a_step(run, name, 1)
    found["fused"] = run.optimizer.defaults["fused"]
    return found, torch.cat([weight.detach().flatten() for weight in run.model.parameters()])


def test_each_change_changes_what_it_names_and_nothing_else(monkeypatch):
    expected = {"none": set(), "no CUDA graph": {"CUDA graph"}, "torch.compile": {"compiled"},
                "torch.compile, no CUDA graph": {"compiled", "CUDA graph"},
                "float32 with TF32": {"bfloat16"}, "float32 without TF32": {"bfloat16", "TF32"},
                "AdamW in a loop": {"fused"}}
    assert list(expected) == list(gpu.CHANGES)
    base, weights = facts("none", monkeypatch)
    assert base == {"compiled": False, "CUDA graph": True, "bfloat16": True, "TF32": True,
                    "fused": True}
    for name, changed in expected.items():
        found, others = facts(name, monkeypatch)
        assert {key for key in base if base[key] != found[key]} == changed, name
        if "bfloat16" not in changed:                              # it costs time, nothing else
            assert torch.allclose(weights, others, atol=1e-6), name
    assert machine.tensor_cores is not contextlib.nullcontext


@pytest.mark.parametrize("trouble, message", [("raises", "the sabotage"), ("sleeps", "stopped")])
def test_a_part_that_breaks_off_leaves_its_rows(tmp_path, monkeypatch, trouble, message):
    def part(flags):
        """A sabotaged part."""
        yield {"row": 1}
        if trouble == "raises":
            raise ValueError("the sabotage")
        time.sleep(20)
        yield {"row": 2}

    monkeypatch.setitem(gpu.PARTS, "rates", part)
    monkeypatch.setattr(gpu, "MINUTES", 1 / 60)
    rows, page = rehearse(tmp_path, "rates")
    assert rows[0] == {"row": 1} and message in rows[1]["failed"] and message in page
    assert len(rows) == 2


@pytest.mark.parametrize("status", [0, 1])
def test_what_the_benchmark_says_is_kept_even_if_it_fails(tmp_path, monkeypatch, status):
    (tmp_path / "results").mkdir()
    program = f"print('begun', flush=True)\nraise SystemExit({status})\n"
    (tmp_path / "results/bench_ntk.py").write_text(program, encoding="utf-8")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    rows, page = rehearse(tmp_path / "out", "kernel")
    said = (tmp_path / "out/bench_ntk.txt").read_text(encoding="utf-8")
    assert said == "begun\n" and len(rows) == 1
    assert ("failed" in rows[0]) == (status == 1) and "## kernel" in page


def test_without_a_gpu_it_says_so_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--tiny"):
        gpu.main(["rates", "--out", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()
