"""The sentences of the pages that quote the study, computed from its rows.

    python results/study_quotes.py          # the sentences that no longer stand on their page

On the pages the numbers are plain text. Here every such sentence, or its part with the numbers,
stands once more, with {} in place of each number and the function that computes it from the rows.
A test compares the two.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
if __name__ == "__main__":
    # Not this folder first: its tabulate.py would hide a library of that name.
    sys.path[0] = str(ROOT)

import train  # noqa: E402
from results import study_statistics as statistics  # noqa: E402
from results.study_statistics import (  # noqa: E402
    THIRDS, VIEWS, conflict, final, interval, joint, of_arm, paired, points, read_rows, relative,
    select, third_error, thousandths, view_error)


class Study:
    """What is quoted of one base, as text. Every method takes the network first."""

    def __init__(self, rows, base):
        self.rows, self.base = rows, base

    def runs(self, model):
        return select(self.rows, self.base, model)[0]

    def mean(self, model, arm, measure):
        return statistics.mean(self.runs(model), arm, measure)

    def error(self, model, first, second, measure=final):
        """Difference of two arms' errors in 1/1000, with its interval."""
        return thousandths(paired(self.runs(model), first, second, measure))

    def joint(self, model, first, second):
        """Difference of two arms' joint accuracies in points, with its interval."""
        return points(paired(self.runs(model), first, second, joint))

    def percent(self, model, arm):
        """Relative difference of an arm's error to the baseline's, with its interval."""
        return interval(relative(self.runs(model), arm), "+.1%")

    def reached(self, model, arm):
        """In how many seeds an arm reaches the baseline's final error."""
        shares = statistics.image_shares(self.runs(model), arm)
        return f"{statistics.arrivals(shares)[0]} of {len(shares)}"

    def images(self, model, arm):
        """Of the images after which the baseline is there, the share that the arm needs."""
        return f"{statistics.arrivals(statistics.image_shares(self.runs(model), arm))[1]:.2f}"

    def seeds(self, model, arm):
        return str(len(of_arm(self.runs(model), arm)))

    # The geometry.

    def conflict(self, model, arm):
        """The share of conflicting pairs after the start."""
        return f"{self.mean(model, arm, conflict):.0%}"

    def kinds(self, model, first, second):
        """The baseline's share of conflicts among two kinds of pairs, first minus second."""
        gaps = []
        for row in of_arm(self.runs(model), "baseline"):
            gaps.append(conflict(row, first) - conflict(row, second))
        return points(gaps)

    def probe(self, model, checkpoint, name):
        """A measure of the baseline's whole matrix at the start (0) or at the end (-1)."""
        def measure(row):
            point = row["probe"][checkpoint]
            if name == "cosine":
                return statistics.mean_cosine(point, row["settings"]["probe"])
            if name == "cross over trace":
                return point["cross"] / point["trace"]
            if name == "most by chance":           # of two independent signs, whatever the other's
                return max(point["conflict"], 1 - point["conflict"])
            return point[name]

        form = {"cosine": ".2f", "cross over trace": ".2f", "drift": ".0f"}.get(name, ".0%")
        return f"{self.mean(model, 'baseline', measure):{form}}"

    def correlation(self, model, *without):
        return f"{statistics.correlation(self.runs(model), *without):+.2f}"

    def near_data(self, model):
        """The share of the baseline's error at t below 1/3, the mean over the views."""
        def measure(row):
            total = 0.0
            for view in VIEWS:
                thirds = [third_error(view, third)(row) for third in THIRDS]
                total += thirds[0] / sum(thirds)
            return total / len(VIEWS)

        return f"{self.mean(model, 'baseline', measure):.0%}"

    # The arm `measured`.

    def offsets_of(self, model, granularity):
        """The offset of a granularity until each checkpoint but the first: means over the seeds."""
        seeds = of_arm(self.runs(model), "measured")
        offsets = []
        for same_checkpoint in zip(*(row["probe"][1:] for row in seeds)):
            values = [point["offsets"][granularity] for point in same_checkpoint]
            offsets.append(sum(values) / len(values))
        return offsets

    def offsets(self, model):
        """The three offsets, each a mean over the checkpoints."""
        means = []
        for granularity in range(len(VIEWS)):
            every = self.offsets_of(model, granularity)
            means.append(f"{sum(every) / len(every):+.2f}")
        return ", ".join(means)

    def lowest_offset(self, model):
        every = []
        for granularity in range(len(VIEWS)):
            every += self.offsets_of(model, granularity)
        return f"{min(every):+.2f}"

    # How it was measured.

    def parameters(self, model):
        row = next(row for row in self.rows if row["model"] == model)
        network = train.build(train.Settings(**row["settings"]))
        return f"{sum(weight.numel() for weight in network.parameters()):,}"

    def of_base(self):
        return [row for row in self.rows if row["base"] == self.base]

    def count(self):
        return str(len(self.of_base()))

    def minutes(self):
        return f"{sum(row['seconds'] for row in self.of_base()) / 60:.0f}"

    def torch(self):
        return ", ".join({row["torch"] for row in self.of_base()})


def both(method, *arguments):
    """The text of the DiT and that of the U-Net."""
    return method("dit", *arguments), method("unet", *arguments)


def sentences(rows):
    """{page: the sentences that must stand on it}."""
    zero, one = Study(rows, 0), Study(rows, 1)
    page = []

    def quote(text, *values):
        page.append(text.format(*values))

    quote_the_answer(quote, zero, one)
    quote_the_ingredients(quote, zero, one)
    quote_the_geometry(quote, zero)
    quote_the_measured_arm(quote, one)
    quote_how_it_was_measured(quote, zero, one)
    return {"results/first_study.md": page}


def quote_the_answer(quote, zero, one):
    quote("a DiT of {} weights and a U-Net of {}", *both(zero.parameters))
    quote("in {} seeds with the DiT and in {} with the U-Net", *both(zero.reached, "sga"))
    quote("its error is larger by {} with the DiT and by {} with the U-Net",
          *both(zero.percent, "sga"))
    quote("Joint accuracy changes by {} points with the DiT and by {} points with the U-Net",
          *both(zero.joint, "sga", "baseline"))
    quote("SGA's error is larger by {} with the DiT and by {} with the U-Net ({} seeds)",
          *both(one.percent, "sga-short"), one.seeds("unet", "sga-short"))
    quote("larger by {} with the DiT, and {} seeds reach the baseline's",
          one.percent("dit", "sga"), one.reached("dit", "sga"))
    quote("{} of the DiT's error lies at t below 1/3", zero.near_data("dit"))


def quote_the_ingredients(quote, zero, one):
    def offsets(arm, measure):
        return zero.error("dit", arm, "baseline", measure)

    macro, micro = view_error("macro"), view_error("micro")
    towards_data, towards_noise = third_error("macro", "data"), third_error("macro", "noise")
    quote("larger, by {} with the DiT and by {} with the U-Net",
          *both(zero.error, "whole", "baseline", macro))
    quote("finds {} with the DiT and {} with the U-Net", *both(zero.error, "sga", "whole"))
    quote("differs from it by {} with the DiT and by {} with the U-Net",
          *both(zero.error, "tuple", "stratified"))
    quote("micro views gain, {} with the DiT, and macro views lose, {}",
          offsets("offsets", micro), offsets("offsets", macro))
    quote("micro {}, macro {}", offsets("flipped", micro), offsets("flipped", macro))
    quote("`offsets` minus `flipped` is {}", zero.error("dit", "offsets", "flipped"))
    quote("in the third of t towards noise by {}, and in the third towards data by {}",
          offsets("offsets", towards_noise), offsets("offsets", towards_data))
    quote("`offsets` minus `global` is {} with the DiT and {} with the U-Net",
          *both(zero.error, "offsets", "global"))
    quote("minus that of `offsets` is {} points with the DiT and {} points with the U-Net",
          *both(zero.joint, "flipped", "offsets"))
    quote("by {} points with the DiT, by {} with the U-Net and by {} with the DiT from base 1",
          *both(zero.joint, "flipped", "baseline"), one.joint("dit", "flipped", "baseline"))


def quote_the_geometry(quote, zero):
    def start_and_end(model, name):
        return zero.probe(model, 0, name), zero.probe(model, -1, name)

    quote("{} of the pairs conflict with the DiT and {} with the U-Net",
          *both(zero.probe, 0, "conflict"))
    quote("the mean cosine is {} and {}, and the cross terms of Eq. 13 are {} and {} times the"
          " trace",
          *both(zero.probe, 0, "cosine"), *both(zero.probe, 0, "cross over trace"))
    quote("At the end {} and {} conflict, the mean cosine is {} and {}, and the ratio is {} and {}",
          *both(zero.probe, -1, "conflict"), *both(zero.probe, -1, "cosine"),
          *both(zero.probe, -1, "cross over trace"))
    quote("by {} points with the DiT and by {} with the U-Net",
          *both(zero.kinds, "root level", "level"))
    quote("a shared root changes the share by {} points with the DiT and by {} with the U-Net",
          *both(zero.kinds, "root", "nothing"))
    quote("The difference is {} points with the DiT and {} with the U-Net",
          *both(zero.kinds, "level", "view"))
    quote("in {} of the pairs at the start and in {} at the end with the DiT, in {} and {} with the"
          " U-Net", *start_and_end("dit", "sign_agreement"),
          *start_and_end("unet", "sign_agreement"))
    quote("in at most {} and {} with the DiT, in at most {} and {} with the U-Net",
          *start_and_end("dit", "most by chance"), *start_and_end("unet", "most by chance"))
    quote("moves by {} times its own size with the DiT and by {} times with the U-Net",
          *both(zero.probe, -1, "drift"))
    quote("is {} with the DiT and {} with the U-Net; without `big` and `min_snr` it is {} and {}",
          *both(zero.correlation), *both(zero.correlation, "big", "min_snr"))
    quote("SGA has {} of the pairs in conflict where the baseline has {}",
          zero.conflict("dit", "sga"), zero.conflict("dit", "baseline"))
    quote("whole scenes alone have {}", zero.conflict("dit", "whole"))


def quote_the_measured_arm(quote, one):
    quote("{} seeds with the DiT and {} with the U-Net", *both(one.seeds, "measured"))
    quote("with {} of the images with the DiT ({} seeds) and with {} with the U-Net ({})",
          one.images("dit", "measured"), one.reached("dit", "measured"),
          one.images("unet", "measured"), one.reached("unet", "measured"))
    quote("`measured` minus `lean` is {} with the DiT and {} with the U-Net",
          *both(one.error, "measured", "lean"))
    quote("{} with the DiT and {} with the U-Net", *both(one.offsets))
    quote("go down to {}", one.lowest_offset("unet"))


def quote_how_it_was_measured(quote, zero, one):
    quote("{} runs from base 0 took {} minutes of training with torch {}, {} runs from base 1 took"
          " {} minutes with torch {}", zero.count(), zero.minutes(), zero.torch(),
          one.count(), one.minutes(), one.torch())


def missing(text, wanted):
    """The sentences that do not stand in a text, whatever its line breaks."""
    text = " ".join(text.split())
    return [sentence for sentence in wanted if sentence not in text]


if __name__ == "__main__":
    for page, wanted in sentences(read_rows()).items():
        text = (ROOT / page).read_text(encoding="utf-8")
        for sentence in missing(text, wanted):
            print(f"{page}: {sentence}")
