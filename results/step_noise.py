"""The square of a step's gradient: what M predicts (Eq. 23), beside what training steps have.

    python results/step_noise.py                # it goes on where it was stopped

A network is fine-tuned as the baseline. At a few checkpoints its weights are held, and nine ways to
choose a step's views, noise levels and weights are looked at twice: once through the interaction
matrix M of all views, and once through the gradients, before clipping, of steps that
train.draw_batch draws. A row of step_noise.jsonl holds both numbers. The bases are those of
results/regimes.py.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
if __name__ == "__main__":
    # Not this folder first: its tabulate.py would hide a library of that name.
    sys.path[0] = str(ROOT)

import torch  # noqa: E402

import flow_matching as fm  # noqa: E402
import sga  # noqa: E402
import train  # noqa: E402
from results import prediction, regimes, study_statistics  # noqa: E402
from support import report  # noqa: E402

ROWS = ROOT / "results/step_noise.jsonl"
CASES = (("dit", "paper"), ("dit", "eight_tuples"), ("unet", "paper"))
SCHEMES = ("baseline", "tuple_max", "tuple", "stratified", "quiet", "offsets", "flipped",
           "min_snr", "min_snr_velocity")
SHARES = (0.0, 0.1, 1 / 3, 1.0)                # of the fine-tuning that is over at a checkpoint
SEED = 200


def take(run, arm):
    """Lets the run's next steps be those of an arm. Its weights stay as they are."""
    run.arm, run.offsets = arm, arm.offsets
    run.products = None
    if arm.meet == "conflict":
        run.products = report.products_of_views(run)
    run.plan_the_finetuning()


def square_of_steps(run, number):
    """(mean, standard error) of |ghat|^2 over the first steps of the plan, none of them taken.

    The error counts the steps as independent draws. M is asked about these very steps, and only
    their noises are by chance, so that the error is too large for that comparison.
    """
    first = run.settings.pretrain_steps + 1
    trained = [weight for weight in run.model.parameters() if weight.requires_grad]
    squares = []
    for step in range(first, first + number):
        x0, e, t, tokens, a = train.draw_batch(run, step)
        loss = (a * fm.loss(run.model, x0, e, t, tokens)).sum()
        gradient = torch.autograd.grad(loss, trained)
        squares.append(sum(part.square().sum() for part in gradient))
    squares = torch.stack(squares).double()
    return squares.mean().item(), (squares.std() / number**0.5).item()


def look(run, scheme, number, repeats):
    """{predicted, measured, its standard error} of one way to choose steps, at the held weights."""
    arm = sga.ARMS[scheme]
    take(run, arm)
    own, between = prediction.own_and_between(run, arm, repeats)
    square, mean_square = prediction.expected_squares(run.plan[:number], own, between)
    # M is that of r = v - u. The training loss |r|^2 / D has 2 / D times the gradient.
    D = 3 * run.settings.pixels**2
    factor = (2 / D) ** 2
    measured, error = square_of_steps(run, number)
    return {"predicted": factor * square, "mean_square": factor * mean_square,
            "measured": measured, "standard_error": error}


def checkpoint_steps(s):
    return [round(share * s.finetune_steps) for share in SHARES]


def measure(model, regime, number, repeats, done):
    """The rows of one case, one after the other, as they are measured."""
    rate = regimes.chosen_rate(regimes.read_rows(), regime, model)
    s = regimes.settings_of(regime, model, "baseline", SEED, rate)
    run = regimes.begin(s)
    for checkpoint in checkpoint_steps(s):
        take(run, sga.ARMS["baseline"])
        while run.step < s.pretrain_steps + checkpoint:
            run.train_step()
        state = run.generator.get_state()
        for scheme in SCHEMES:
            key = {"model": model, "regime": regime, "step": checkpoint, "scheme": scheme}
            if tuple(key.values()) in done:
                continue
            # Every scheme sees the same noises, as far as its steps allow.
            run.generator.set_state(state)
            found = look(run, scheme, min(number, s.finetune_steps), repeats)
            yield key | found | {"device": report.device_name(s), "torch": torch.__version__}
        run.generator.set_state(state)


def read_rows():
    """Every row so far."""
    return study_statistics.read_rows(ROWS)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=300, help="steps behind a measured square")
    parser.add_argument("--repeats", type=int, default=4, help="samples of each view in M")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    done = {tuple(row[name] for name in ("model", "regime", "step", "scheme"))
            for row in read_rows()}
    for model, regime in CASES:
        for row in measure(model, regime, flags.number, flags.repeats, done):
            with open(ROWS, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
            print(f"{model} {regime} {row['step']} {row['scheme']}: predicted "
                  f"{row['predicted']:.3g}, measured {row['measured']:.3g}", flush=True)


if __name__ == "__main__":
    main()
