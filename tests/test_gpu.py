"""The one command for a GPU, rehearsed on a CPU: its clock, its FLOPs, its changes and its page are what they say."""

import contextlib
import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import ntk
import toy_data
import train


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("gpu", Path(__file__).parent.parent / "results/gpu.py")
    module = importlib.util.module_from_spec(spec)
    torch.ones((), requires_grad=True).backward()                          # before dynamo is there: ntk.cost forks, and with it could not later
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


def tiny(gpu, model="dit", **more):
    return gpu.settings(types.SimpleNamespace(settings=gpu.REHEARSAL["settings"] | {"compile": 0} | more), model)


# --- speedrun ---

def timed(gpu, monkeypatch, accuracies, limit=1e9, **more):
    """The row of a race in which a step takes 1 second and an evaluation 10, with these joint accuracies."""
    now, found, step = [0.0], iter(accuracies), train.Run.train_step

    def spend(seconds, value=None):
        now[0] += seconds
        return value
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "clock", lambda device: now[0])
        patch.setattr(gpu, "joint", lambda images, scenes: 0.8)            # the ceiling
        patch.setattr(gpu, "evaluated", lambda *_: spend(10.0, next(found)))
        patch.setattr(train.Run, "train_step", lambda run, plan: spend(1.0, step(run, plan)))
        return gpu.race(tiny(gpu, pretrain_steps=6, **more), 0.95, 4, limit)


def test_the_clock_stops_at_the_evaluation_that_passes(gpu, monkeypatch):
    row = timed(gpu, monkeypatch, [0.75, 0.77])                            # 95% of the ceiling is 0.76
    assert row["result"] == "reached" and (row["joint"], row["ceiling"]) == (0.77, 0.8)
    assert (row["seconds"], row["evaluating"], row["first_step"], row["images"]) == (24, 20, 1, 4 * 4)
    assert row["images_per_s"] == 4 and row["curve"] == [(8, 12.0, 0.75), (16, 24.0, 0.77)]
    assert timed(gpu, monkeypatch, [0.77])["seconds"] == 12                # the twin that passes at once


@pytest.mark.parametrize("limit, seconds, result", [(1e9, 36, "not reached in its steps"), (13, 24, "not reached in its time")])
def test_a_run_that_does_not_get_there_says_so(gpu, monkeypatch, limit, seconds, result):
    row = timed(gpu, monkeypatch, [0.1, 0.2, 0.3], limit)
    assert row["result"] == result and row["seconds"] == seconds and row["joint"] == (0.3 if seconds == 36 else 0.2)


def test_the_accuracy_is_that_of_the_averaged_weights_on_the_same_captions_for_every_seed(gpu, monkeypatch):
    seen = []

    def sample(model, tokens, s, generator):
        seen.append((model, tokens, generator.initial_seed()))
        return torch.zeros(4, 3, 8, 8)
    monkeypatch.setattr(train, "sample", sample)
    monkeypatch.setattr(train.Run, "prepare", lambda run: seen.append(run.ema))
    for seed in (0, 1):
        assert 0 < gpu.race(tiny(gpu, seed=seed), 0.0, 4, 1e9)["ceiling"] <= 1
    ema, (model, tokens, noise), other_ema, (other_model, *same) = seen
    assert model is ema and other_model is other_ema and torch.equal(tokens, same[0]) and noise == same[1]
    assert (tokens[:, 0] == toy_data.WORDS.index("macro")).all() and ((tokens > 0).sum(1) > 8).all()      # of two objects


# --- FLOPs ---

def test_flops_are_those_of_the_closed_form(gpu):
    N, a, b, c = 5, 8, 16, 4
    network, x = nn.Sequential(nn.Linear(a, b), nn.GELU(), nn.Linear(b, c)), torch.randn(N, a)
    forward = 2 * N * (a * b + b * c)
    assert gpu.flops(lambda: network(x)) == forward
    everything = forward + 2 * N * (a * b + 2 * b * c)                     # the first layer's input needs no gradient
    assert gpu.flops(lambda: network(x).sum().backward()) == everything
    network[0].requires_grad_(False)                                       # a twin that does less: no gradient passes the second layer
    assert gpu.flops(lambda: network(x).sum().backward()) == forward + 2 * N * b * c


def test_attention_counts_as_products(gpu):
    q = torch.randn(2, 3, 5, 8)                                            # (N, heads, Q, C)
    assert gpu.flops(lambda: nn.functional.scaled_dot_product_attention(q, q, q)) == 2 * 2 * (2 * 3 * 5 * 5 * 8)
    s = tiny(gpu)
    model = train.build(s)
    block = sum(p.numel() for part in (model.blocks[0].qkv, model.blocks[0].out, model.blocks[0].mlp) for p in part.parameters() if p.dim() == 2)
    assert gpu.flops(lambda: gpu.gradient(model, s)) > 6 * s.batch * (s.pixels // s.patch) ** 2 * block     # forward, and twice that backward


# --- changes ---

def facts(gpu, name, monkeypatch):
    """What happens in the building and in one step of a change's run."""
    found = dict.fromkeys(("compiled", "static", "texts", "numbers", "averages"), 0)
    s = tiny(gpu, compile=1)

    def counted(key, function):
        def call(*arguments, **more):
            found[key] += 1
            return function(*arguments, **more)
        return call

    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", counted("compiled", lambda network, **more: found.update(static=more) or network))
        patch.setattr(toy_data, "tokenize", counted("texts", toy_data.tokenize))
        patch.setattr(torch.Tensor, "item", counted("numbers", torch.Tensor.item))
        patch.setattr(torch, "_foreach_lerp_", counted("averages", torch._foreach_lerp_))
        more, stand_in = gpu.changes_of(s)[name]
        with stand_in():
            run = gpu.ready(train.dataclasses.replace(s, **more))
            run.model.register_forward_pre_hook(lambda _, inputs: found.update(
                batch=len(inputs[0]), autocast=torch.is_autocast_enabled("cpu"),
                tf32=(torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)))
            gpu.steps(run, 1, 0)
    return found | {"fused": run.optimizer.defaults["fused"]}, torch.cat([p.detach().flatten() for p in run.ema.parameters()])


CHANGED = {"none": set(), "without torch.compile": {"compiled", "static"}, "float32 with TF32": {"autocast"}, "float32 without TF32": {"autocast", "tf32"},
           "captions by text on the host": {"texts"}, "the host reads a number in every step": {"numbers"},
           "AdamW not fused": {"fused", "numbers"},                            # on a CPU it reads its count of steps
           "weights averaged one by one": {"averages"}, "half the batch": {"batch", "static"}}


def test_each_change_changes_what_it_names_and_is_undone(gpu, monkeypatch):
    places = [(toy_data, "caption_tokens"), (torch.nn.utils, "clip_grad_norm_"), (torch.optim, "AdamW"), (torch, "_foreach_lerp_"), (torch, "compile"),
              (train, "tensor_cores")]
    originals = [getattr(*place) for place in places]
    base, weights = facts(gpu, "none", monkeypatch)
    assert list(gpu.changes_of(tiny(gpu))) == list(CHANGED) and base["tf32"] == ("high", True) and base["fused"]
    for name, expected in CHANGED.items():                                 # the first, which changes nothing, is the twin
        found, others = facts(gpu, name, monkeypatch)
        assert {key for key in base.keys() | found.keys() if base.get(key) != found.get(key)} == expected, name
        assert found["static"] == ({"dynamic": False} if name == "half the batch" else {}) if found["compiled"] else expected, name
        if not expected & {"batch", "autocast"}:
            assert torch.allclose(weights, others, atol=1e-6), name        # it costs time, and computes the same
    assert all(getattr(*place) is original for place, original in zip(places, originals))
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32


def test_the_same_round_draws_the_same_tensors(gpu, monkeypatch):
    drawn, draw = [], train.draw_batch
    monkeypatch.setattr(train, "draw_batch", lambda *arguments: drawn.append(draw(*arguments)) or drawn[-1])
    run, other = gpu.ready(tiny(gpu)), gpu.ready(tiny(gpu))
    gpu.steps(other, 1, 3)                                                 # which has gone another way
    drawn.clear()
    for one, seed in ((run, 1), (other, 1), (run, 2)):
        gpu.steps(one, 1, seed)
    assert all(torch.equal(a, b) for a, b in zip(drawn[0], drawn[1])) and not torch.equal(drawn[0][0], drawn[2][0])


# --- kernel, and other programs ---

def test_the_largest_batch_is_the_last_that_fits(gpu, monkeypatch):
    def room_for(most):
        def compute(model, inputs, r, compute=ntk.fast_interaction_matrix):
            if len(r) > most:
                raise torch.OutOfMemoryError("no room")
            return compute(model, inputs, r)
        return compute
    with monkeypatch.context() as patch:
        patch.setattr(ntk, "fast_interaction_matrix", room_for(2))
        row = gpu.largest(tiny(gpu), "M", 1, 64, 1e18)
        with pytest.raises(torch.OutOfMemoryError):                        # not one size fits: something is wrong
            gpu.largest(tiny(gpu), "M", 4, 64, 1e18)
    assert row["N"] == 2 and row["seconds"] > 0 and row["end"] == "N = 4: OutOfMemoryError: no room" and row["gap"] < 1e-5
    assert gpu.largest(tiny(gpu), "M", 1, 4, 1e18)["end"] == "the last size"       # a twin with room
    assert gpu.largest(tiny(gpu), "K", 1, 4, 0.0)["end"] == "time: N = 2 was not tried"


def test_a_program_that_takes_too_long_is_stopped_and_its_words_are_kept(gpu):
    assert "said" in gpu.child(["-c", "print('said')"], 20)["note"]
    said = gpu.child(["-c", "import time; print('begun', flush=True); time.sleep(60)"], 3)["note"]
    assert "stopped after 3 s" in said and said.endswith("begun")
    with pytest.raises(RuntimeError, match="it is broken"):
        gpu.child(["-c", "raise SystemExit('it is broken')"], 20)


# --- the command ---

def rehearsed(gpu, monkeypatch, folder, *arguments):
    """What a smaller rehearsal returns, its rows by part and its page; without the programs, which are tested alone."""
    monkeypatch.setattr(gpu, "child", lambda arguments, limit: {"note": " ".join(arguments)})
    monkeypatch.setattr(gpu, "REHEARSAL", gpu.REHEARSAL | {"product": 64, "sizes": {"M": (1, 1), "K": (1, 1)}})
    failed = gpu.main(["--rehearse", "--out", str(folder), *arguments])
    rows = [json.loads(line) for line in (folder / "gpu.jsonl").read_text().splitlines()]
    return failed, {part: [row for row in rows if row["part"] == part] for part in gpu.PARTS}, (folder / "gpu.md").read_text()


def test_the_rehearsal_leaves_a_page_and_rows(gpu, monkeypatch, tmp_path):
    failed, rows, page = rehearsed(gpu, monkeypatch, tmp_path, "--set", "compile=0")
    assert not failed and not any("failed" in row for part in rows.values() for row in part)
    for row in rows["speedrun"]:
        assert row["result"] == "reached" and 0 < row["first_step"] < row["seconds"] and row["images"] == 8 and f"{row['parameters']:,}" in page
    for row in rows["rate"]:
        assert row["share"] == pytest.approx(row["flops"] * row["images_per_s"] / 4 / row["peak"]) and row["low"] <= row["steps_per_s"] <= row["high"]
    assert [row["model"] for row in rows["speedrun"]] == [row["model"] for row in rows["rate"]] == ["dit", "unet"]
    assert [row["change"] for row in rows["changes"] if row.get("model") == "dit"] == list(CHANGED)
    assert all(row["low"] <= row["ratio"] <= row["high"] for row in rows["changes"] if "ratio" in row) and rows["changes"][0]["ratio"] == 1
    assert [(row["what"], row["N"] > 0) for row in rows["kernel"][1:]] == [("M", True), ("K", True)]
    command = f"python results/gpu.py --rehearse --out {tmp_path} --set compile=0"
    assert f"`{command}` on CPU" in page and {(row["command"], row["torch"]) for part in rows.values() for row in part} == {(command, torch.__version__)}
    assert all(words in page for words in ("ntk.py --bench 1", "tests/side_by_side.py", "results/study.py --device cuda", "| aim |"))


def test_the_speedrun_compiles_from_nothing_in_its_first_step(gpu, monkeypatch, tmp_path):
    """As the rehearsal does it: traced by dynamo, with Python instead of a compiler. A second seed compiles again."""
    compiled, cold, compile, step = [], [], torch.compile, train.Run.train_step

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward
    monkeypatch.setattr(gpu, "AIMS", {"dit": 60})
    monkeypatch.setattr(gpu, "REHEARSAL", gpu.REHEARSAL | {"seeds": (0, 1)})
    monkeypatch.setattr(torch, "compile", lambda network, **more: compile(network, **more | {"backend": {"eager": backend}[more["backend"]]}))
    monkeypatch.setattr(train.Run, "train_step", lambda run, plan: cold.append(torch.compiler.config.force_disable_caches) or step(run, plan))
    failed, rows, _ = rehearsed(gpu, monkeypatch, tmp_path, "--parts", "speedrun")
    assert not failed and len(compiled) == 2 and cold == 4 * [True] and not torch.compiler.config.force_disable_caches
    assert all(row["first_step"] > row["seconds"] / 4 for row in rows["speedrun"])


def test_a_part_that_fails_leaves_the_others(gpu, monkeypatch, tmp_path):
    def broken(o, deadline):
        """A sabotaged part."""
        yield {"note": "one row is there"}
        raise ValueError("the sabotage")
    parts = ["--parts", "rate", "side", "--set", "compile=0"]
    with monkeypatch.context() as patch:
        patch.setitem(gpu.PARTS, "rate", broken)
        failed, rows, page = rehearsed(gpu, monkeypatch, tmp_path, *parts)
    assert failed == 1 and [row.get("note", row.get("failed")) for row in rows["rate"]] == ["one row is there", "ValueError: the sabotage"]
    assert "**Failed**: ValueError: the sabotage" in page and len(rows["side"]) == 1
    failed, again, page = rehearsed(gpu, monkeypatch, tmp_path, "--parts", "rate", "--set", "compile=0")       # the twin: it is mended
    assert not failed and len(again["rate"]) == 2 and "Failed" not in page and again["side"] == rows["side"]
    assert "Not measured." in page                                         # of the parts that never ran


def test_without_a_gpu_it_says_so_in_one_sentence(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--rehearse" in gpu.main(["--out", str(tmp_path / "none")]) and not (tmp_path / "none").exists()
    with contextlib.redirect_stderr(None), pytest.raises(SystemExit):
        gpu.main(["--set", "no_such_setting=1"])
