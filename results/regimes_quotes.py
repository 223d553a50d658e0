"""The sentences of results/README.md that quote the second study, computed from its rows.

    python results/regimes_quotes.py        # the sentences that no longer stand on the page

As in study_quotes.py: here stands every sentence with numbers, or its part with the numbers, with
{} in place of each number and the function that computes it from the rows. A test compares them.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
if __name__ == "__main__":
    # Not this folder first: its tabulate.py would hide a library of that name.
    sys.path[0] = str(ROOT)

from results import ranks, regimes, regimes_report, step_noise, yardsticks  # noqa: E402
from results.regimes_report import mean, text_of  # noqa: E402
from results.study_quotes import missing  # noqa: E402

PAGE = "results/README.md"
VIEWS = yardsticks.VIEWS


class Rows:
    """What is quoted of the rows, as text."""

    def __init__(self, rows):
        self.rows = rows

    def table(self, regime, model):
        return regimes_report.table_of(self.rows, regime, model)

    def effect(self, regime, model, arm, yardstick):
        """An arm's effect with its t interval."""
        values = regimes_report.effects(self.table(regime, model), arm, yardstick)
        return interval_text(values, regimes_report.YARDSTICKS[yardstick][1])

    def between(self, models, first, second, yardstick):
        """The effect of one arm minus that of another, in the paper-like regime.

        The pairs of several networks are taken together.
        """
        differences = []
        for model in models:
            table = self.table("paper", model)
            pairs = zip(regimes_report.effects(table, first, yardstick),
                        regimes_report.effects(table, second, yardstick), strict=True)
            differences += [one - other for one, other in pairs]
        return interval_text(differences, regimes_report.YARDSTICKS[yardstick][1])

    def fit_of(self, model, arm, view):
        """The effect on the fit of one granularity, in the paper-like regime."""
        return interval_text(regimes_report.fits_of_view(self.table("paper", model), arm, view),
                             "%")

    def right_signs(self, model):
        """Of the arms with another expected gradient and their granularities: in how many M said
        rightly, in the paper-like regime, whether the fit becomes better or worse.
        """
        table = self.table("paper", model)
        right, cases = 0, 0
        for arm, (_, gradient, _) in regimes_report.MECHANISMS.items():
            if gradient == "yes" or arm == "sga-short" or not regimes_report.pairs_of(table, arm):
                continue
            for view in VIEWS:
                faster = mean(regimes_report.predicted_rates(table, arm, view)) > 0
                better = mean(regimes_report.fits_of_view(table, arm, view)) < 0
                right += faster == better
                cases += 1
        return f"{right} of {cases}"

    def lowest_layout(self):
        """The smallest share of samples of a run whose layout is right."""
        layout, _ = regimes_report.YARDSTICKS["layout"]
        shares = [layout(row) for row in self.rows if row["seed"] in regimes.SEEDS]
        return f"{min(shares):.0%}"

    def fading(self, noises):
        """The noise of root tuples over the baseline's, predicted at every checkpoint in turn."""
        predicted = {}
        for row in noises:
            if (row["model"], row["regime"]) == ("dit", "paper"):
                noise = row["predicted"] / row["mean_square"]
                predicted[row["scheme"], row["step"]] = noise
        steps = sorted({step for _, step in predicted})
        ratios = [predicted["tuple_max", step] / predicted["baseline", step] for step in steps]
        *first, last = (f"{ratio:.2f}" for ratio in ratios)
        return f"{', '.join(first)} and {last}"

    def error(self, regime, model):
        """The baseline's own generalisation error in 1/1000, the mean over the seeds."""
        rows = self.of(regime, model, "baseline")
        return f"{1000 * mean(regimes_report.generalisation(row) for row in rows):.0f}"

    def of(self, regime, model, arm):
        """The rows of an arm, one for each seed."""
        table = self.table(regime, model)
        return [row for (name, _), row in table.items() if name == arm]

    def noise(self, model, arm):
        """The noise of a step over the baseline's, as M predicts it in the paper-like regime."""
        return f"{mean(regimes_report.predicted_noises(self.table('paper', model), arm)):.2f}"

    def conflict(self, model, arm, checkpoint):
        """The share of conflicting pairs in an arm's probe, at its start (0) or end (-1)."""
        rows = self.of("paper", model, arm)
        return f"{mean(row['probe'][checkpoint]['conflict'] for row in rows):.0%}"

    def conflict_change(self, model, arm):
        """The arm's share of conflicting pairs at the end minus the baseline's, in points."""
        pairs = regimes_report.pairs_of(self.table("paper", model), arm)
        changes = [100 * (row["probe"][-1]["conflict"] - baseline["probe"][-1]["conflict"])
                   for row, baseline in pairs]
        return interval_text(changes, "points")


def interval_text(values, unit):
    """Such as "+2.3% (+1.4 to +3.1)"."""
    centre, interval = text_of(values).split(" ", 1)
    unit = "%" if unit == "%" else " points"
    return f"{centre}{unit} {interval}"


def sentences(rows, noises, of_ranks):
    """The sentences that must stand on the page, from the rows of all three files."""
    found, study = [], Rows(rows)

    def quote(text, *values):
        found.append(text.format(*values))

    quote_the_answer(quote, study)
    quote_the_mechanism(quote, study)
    quote_the_ranks(quote, of_ranks)
    quote("Of {} predictions the median is wrong by {} and the worst by {}, and {} lie outside of "
          "their bars, all with {}", *errors_of_predictions(noises), schemes_outside(noises))
    quote("Of {} such squares the median is wrong by {}, and {} lie outside of two standard errors",
          *errors_of_squares(noises))
    quote("the baseline's own square is uncertain by {}", f"{largest_uncertainty(noises):.0%}")
    quote("predicts root tuples to be {} times as noisy", study.fading(noises))
    quote("Over all twelve checkpoints root tuples are measured at {} times the baseline's noise "
          "(standard error {}), where M predicts {}", *noise_of_root_tuples(noises))
    minutes = sum(row["seconds"] for row in rows) / 60
    quote("{} runs took {} minutes of training", len(rows), f"{minutes:.0f}")
    minutes = sum(row["seconds"] for row in of_ranks) / 60
    quote("{} runs of the ranks took {} minutes", len(of_ranks), f"{minutes:.0f}")
    return found


def quote_the_answer(quote, study):
    def four(model, arm):
        return [study.effect("paper", model, arm, name)
                for name in ("fit", "generalisation", "joint, guidance 2", "shape")]

    def fits(model):
        return [study.effect(regime, model, "sga", "fit") for regime in regimes.REGIMES]

    text = "fit {}, generalisation {}, joint accuracy {}, shape {}"
    for model in regimes.MODELS:
        quote(text, *four(model, "sga"))
        quote(text, *four(model, "sga-short"))
    quote("layout is right in at least {} of the samples", study.lowest_layout())
    quote("the fit of macro views changes by {}, that of meso views by {}, and that of micro views "
          "by {}", *(study.fit_of("dit", "sga", view) for view in VIEWS))
    for model in regimes.MODELS:
        quote("by {} in the paper-like regime, by {} from the macro base, by {} with all weights "
              "and by {} with 8 tuples a step", *fits(model))
    quote("{}/1000 from the base that knows close-ups and {}/1000 from the macro base",
          study.error("paper", "dit"), study.error("macro_base", "dit"))


def quote_the_mechanism(quote, study):
    def quieter(models, yardstick):
        return study.between(models, "quiet", "tuple_max", yardstick)

    quote("{} times as noisy as one of the baseline with the DiT, and a step of quiet tuples {} "
          "times", study.noise("dit", "tuple_max"), study.noise("dit", "quiet"))
    quote("Quiet tuples change the fit by {} with the DiT and by {} with the U-Net, generalisation "
          "by {} and {}, and joint accuracy by {} and {}",
          *(quieter([model], name) for name in ("fit", "generalisation", "joint, guidance 2")
            for model in regimes.MODELS))
    quote("Against the baseline itself quiet tuples change the DiT's fit by {} and its joint "
          "accuracy by {}", study.effect("paper", "dit", "quiet", "fit"),
          study.effect("paper", "dit", "quiet", "joint, guidance 2"))
    quote("the ten pairs of both networks together give {} of fit and {} of generalisation",
          quieter(regimes.MODELS, "fit"), quieter(regimes.MODELS, "generalisation"))
    quote("they cost the U-Net {} of fit from the macro base and {} of joint accuracy with all "
          "weights", study.effect("macro_base", "unet", "tuple_max", "fit"),
          study.effect("all_weights", "unet", "tuple_max", "joint, guidance 2"))
    quote("offsets change the fit of macro views by {} and that of micro views by {}; flipped "
          "offsets by {} and {}", *(study.fit_of("dit", arm, view)
                                    for arm in ("offsets", "flipped")
                                    for view in ("macro", "micro")))
    quote("SGA differs from Min-SNR alone by {} in fit",
          study.between(["unet"], "sga", "min_snr", "fit"))
    quote("is right in {} cases with the DiT. With the U-Net it is right in {}",
          *(study.right_signs(model) for model in regimes.MODELS))
    quote("the share grows from {} to {} in the baseline and to {} with SGA; with the U-Net from "
          "{} to {} in the baseline and to {} with SGA",
          study.conflict("dit", "baseline", 0), study.conflict("dit", "baseline", -1),
          study.conflict("dit", "sga", -1),
          study.conflict("unet", "baseline", 0), study.conflict("unet", "baseline", -1),
          study.conflict("unet", "sga", -1))
    quote("the difference is {} with the DiT and {} with the U-Net",
          *(study.conflict_change(model, "sga") for model in regimes.MODELS))


def quote_the_ranks(quote, rows):
    def means(arm, measure):
        return [ranks.mean_of(rows, rank, arm, measure) for rank in ranks.RANKS]

    def span(values, form=".1%"):
        return f"{min(values):{form}}", f"{max(values):{form}}"

    fits = dict(zip(ranks.RANKS, means("baseline", regimes_report.fit)))
    quote("the baseline's fit is {}/1000 at rank 1, {}/1000 at rank 16 and {}/1000 with all "
          "weights", *(f"{1000 * fits[rank]:.0f}" for rank in (1, 16, 0)))
    quote("the share of pairs in conflict is between {} and {} at every rank, and between {} and "
          "{} with SGA",
          *span(means("baseline", ranks.conflict)), *span(means("sga", ranks.conflict)))
    noises = zip(means("tuple_max", regimes_report.noise_of),
                 means("baseline", regimes_report.noise_of))
    ends = span([tuples / own for tuples, own in noises], ".2f")
    quote("predicts root tuples to be {} times as noisy", " to ".join(sorted(set(ends))))
    effects = [mean(ranks.effect(rows, rank, "sga", regimes_report.fit)) for rank in ranks.RANKS]
    quote("SGA changes the fit by {} to {}", *(f"{end}%" for end in span(effects, "+.1f")))
    quote("have another sign than M_ij in {} to {} of the pairs",
          *span(means("baseline", ranks.flipped)))
    quote("the share of pairs below 0 is between {} and {}",
          *span(means("baseline", ranks.conflict_for_adamw)))


def errors_of_predictions(noises):
    """(how many, median and largest error, how many outside of their bars) of the noises."""
    found = regimes_report.noises_over_the_baselines(noises)
    errors, outside = compare(one[2:] for one in found)
    return len(errors), f"{errors[len(errors) // 2]:.0%}", f"{errors[-1]:.0%}", outside


def schemes_outside(noises):
    """The arms of the noises that lie outside of their bars, as they are listed on the page."""
    outside = set()
    for _, scheme, predicted, measured, bar in regimes_report.noises_over_the_baselines(noises):
        if is_outside(predicted, measured, bar):
            outside.add(scheme)
    return ", ".join(f"`{scheme}`" for scheme in sorted(outside))


def noise_of_root_tuples(noises):
    """(measured, its standard error, predicted) over the baseline's: means over all checkpoints.

    A checkpoint counts by the precision of what was measured there.
    """
    sums = [0.0, 0.0, 0.0]
    for _, scheme, predicted, measured, bar in regimes_report.noises_over_the_baselines(noises):
        if scheme == "tuple_max":
            weight = 4 / bar**2
            sums = [one + weight * value for one, value in zip(sums, (1, measured, predicted))]
    weights, measured, predicted = sums
    return f"{measured / weights:.2f}", f"{weights ** -0.5:.2f}", f"{predicted / weights:.2f}"


def errors_of_squares(noises):
    """(how many, median error, how many outside of two standard errors) of E|ghat|^2 itself."""
    errors, outside = compare((row["predicted"], row["measured"], 2 * row["standard_error"])
                              for row in noises)
    return len(errors), f"{errors[len(errors) // 2]:.0%}", outside


def compare(triples):
    """The relative errors in their order, and how many lie outside of their bars."""
    errors, outside = [], 0
    for predicted, measured, bar in triples:
        errors.append(abs(predicted - measured) / measured)
        outside += is_outside(predicted, measured, bar)
    return sorted(errors), outside


def is_outside(predicted, measured, bar):
    """Whether a prediction lies farther from what was measured than its bar reaches."""
    return abs(predicted - measured) > bar


def largest_uncertainty(noises):
    """The largest relative standard error of a baseline's square."""
    return max(row["standard_error"] / row["measured"] for row in noises
               if row["scheme"] == "baseline")


if __name__ == "__main__":
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    found = sentences(regimes.read_rows(), step_noise.read_rows(), ranks.read_rows())
    for sentence in missing(text, found):
        print(f"{PAGE}: {sentence}")
