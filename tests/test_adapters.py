"""Low-rank adapters: what is trained, what is not, and that its kernel is exact."""

import copy

import pytest
import torch

import ntk
import train
from support import adapters, report

MODELS = ("dit", "unet")


def settings(model, **changes):
    tiny = train.PRESETS["tiny", model] | {"model": model, "rank": 2, "pixels": 8, "tuples": 2}
    return train.Settings(**tiny | changes)


def begun(model, **changes):
    """A run at the start of its fine-tuning."""
    run = train.Run(settings(model, **changes))
    run.step = run.settings.pretrain_steps
    run.begin_finetuning()
    return run


@pytest.fixture(params=MODELS)
def model(request):
    return request.param


def test_an_adapter_changes_nothing_until_it_is_trained(model):
    plain = train.build(settings(model))
    torch.nn.init.normal_(list(plain.parameters())[-1])                # the last layer begins at 0
    adapted = copy.deepcopy(plain)
    adapters.add(adapted, settings(model))
    x, t, tokens = torch.randn(2, 3, 8, 8), torch.rand(2), torch.ones(2, 12, dtype=torch.long)
    assert torch.equal(adapted(x, t, tokens), plain(x, t, tokens))
    with torch.no_grad():
        for module in adapted.modules():
            if isinstance(module, adapters.Adapted):
                module.B.weight.fill_(0.1)
    assert not torch.equal(adapted(x, t, tokens), plain(x, t, tokens))  # twin


def test_only_the_adapters_are_trained_and_each_correction_has_their_rank(model):
    run = begun(model)
    before = copy.deepcopy(run.model.state_dict())
    for _ in range(3):
        run.train_step()
    for name, weight in run.model.state_dict().items():
        is_adapter = name.endswith((".A.weight", ".B.weight"))
        if not is_adapter:
            assert torch.equal(weight, before[name]), name
    layers = [module for module in run.model.modules() if isinstance(module, adapters.Adapted)]
    trained = sum(weight.numel() for weight in run.model.parameters() if weight.requires_grad)
    assert trained == sum(one.A.weight.numel() + one.B.weight.numel() for one in layers)
    assert any(one.B.weight.abs().max() > 0 for one in layers)
    for one in layers:
        correction = one.B.weight.flatten(1) @ one.A.weight.flatten(1)
        assert torch.linalg.matrix_rank(correction) <= 2


def test_every_linear_and_convolution_has_one_adapter(model):
    run = begun(model)
    adapters.add(run.model, run.settings)                              # twice is as once
    plain = train.build(settings(model, rank=0))
    wanted = [name for name, module in plain.named_modules()
              if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))]
    found = [name for name, module in run.model.named_modules()
             if isinstance(module, adapters.Adapted)]
    assert found == wanted


def test_the_adapters_of_a_seed_are_the_same_whatever_was_drawn_before(model):
    def first(seed):
        network = train.build(settings(model, rank=0))
        torch.rand(1)
        adapters.add(network, settings(model, seed=seed))
        return torch.cat([p.flatten() for p in network.parameters() if p.requires_grad])

    one = first(1)
    torch.rand(7)
    assert torch.equal(first(1), one)
    assert not torch.equal(first(2), one)                              # twin


def test_matrix_and_kernel_of_an_adapter_are_exact(model):
    """Eq. 11, 12: the fast routes against one gradient for each sample or output, in float64."""
    run = begun(model, probe=1)
    for _ in range(2):
        run.train_step()
    network = run.model.double()
    inputs, u, _ = report.probe_batch(run.settings, run.roots, 1)
    inputs = (inputs[0].double(), inputs[1].double(), inputs[2])
    r = report.residuals_of(network, inputs, u.double())
    M = ntk.fast_interaction_matrix(network, inputs, r)
    by_gradients = ntk.interaction_matrix(*ntk.of_module(network), inputs, r)
    scale = by_gradients.abs().max()
    assert scale > 0
    assert (M - by_gradients).abs().max() < 1e-10 * scale
    two = tuple(z[:2] for z in inputs)
    K = ntk.fast_ntk_blocks(network, two)
    by_jacobians = ntk.ntk_blocks(*ntk.of_module(network), two, chunk=48)
    scale = by_jacobians.abs().max()
    assert scale > 0
    assert (K - by_jacobians).abs().max() < 1e-10 * scale


def test_a_run_with_adapters_goes_on_as_if_it_had_not_stopped(model, tmp_path):
    file = str(tmp_path / "checkpoint.pt")
    whole = begun(model, arm="quiet")
    for _ in range(2):
        whole.train_step()
    whole.save(file)
    again = train.resumed_run({}, str(tmp_path))
    for run in (whole, again):
        run.train_step()
    for name in ("model", "ema"):
        one, other = getattr(whole, name).state_dict(), getattr(again, name).state_dict()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert all(torch.equal(one, other) for (one, _), (other, _) in zip(whole.plan, again.plan))


def test_a_checkpoint_with_adapters_draws(model, tmp_path, capsys):
    run = begun(model)
    run.train_step()
    file, picture = str(tmp_path / "checkpoint.pt"), str(tmp_path / "drawn.png")
    run.save(file)
    train.main(["sample", "--checkpoint", file, "--out", picture, "--device", "cpu",
                "meso red striped circle on white"])
    assert "four samples" in capsys.readouterr().out


def test_an_init_with_adapters_is_refused_in_one_sentence(model, tmp_path):
    run = begun(model)
    run.train_step()
    file = str(tmp_path / "checkpoint.pt")
    run.save(file)
    with pytest.raises(SystemExit, match="it is fine-tuned with adapters"):
        train.new_run(settings(model, init=file), str(tmp_path / "new"))


@pytest.mark.parametrize("more", [{"groups": 2}, {"dilation": 2}])
def test_a_convolution_that_an_adapter_does_not_fit_is_refused(more):
    with pytest.raises(ValueError, match="without groups or dilation"):
        adapters.Adapted(torch.nn.Conv2d(4, 4, 3, **more), 2)


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect"])
def test_a_correction_sees_the_margin_that_its_layer_sees(mode):
    """With A and B set to the layer's weight and to the identity, the output doubles."""
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(2, 3, 3, stride=2, padding=1, padding_mode=mode, bias=False)
    adapted, z = adapters.Adapted(layer, rank=3), torch.randn(4, 2, 6, 6)
    with torch.no_grad():
        adapted.A.weight.copy_(layer.weight)
        adapted.B.weight.copy_(torch.eye(3)[:, :, None, None])
    assert torch.allclose(adapted(z), 2 * layer(z), atol=1e-6)
