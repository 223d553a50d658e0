"""The three yardsticks of the second study (regimes.py), for one fine-tuned network.

Fit asks how close the network is to what its loss asks for: the exact velocity u* of the very
images that it was fine-tuned on. Generalisation asks for the exact velocity of all images of a
caption, of which the network has seen a few: the loss does not ask for this, and a network that
remembers its images perfectly has a large error here. The reader says what samples show: layout,
shape and colour, texture, and all of it jointly.
"""

import dataclasses

import torch

import flow_matching as fm
import toy_data
from results.study_statistics import THIRDS
from support import machine, report

VIEWS = toy_data.GRANULARITIES
SPLITS = ("seen", "held_out")
GUIDANCE = (1.0, 2.0)
READ = ("layout", "shape_colour", "texture", "joint")


def measure(run, s):
    """All yardsticks of a run's averaged weights, as nested dictionaries of numbers."""
    network = run.ema
    found = {"fit": {}, "generalisation": {}, "reader": {}}
    for view in VIEWS:
        found["fit"][view] = errors_by_third(network, training_set(run, view, s), s)
        for split in SPLITS:
            held = report.validation_set(s, run.roots, "target", split, view)
            found["generalisation"][f"{split} {view}"] = errors_by_third(network, held, s)
            for scale in GUIDANCE:
                key = f"{split} {view} {scale:g}"
                found["reader"][key] = read(network, run.roots, split, view, scale, s)
    return found


def training_set(run, view, s):
    """x0, e, t, tokens and u* as of report.validation_set, for the fine-tuning's own images.

    Roots may share a caption. The population of a caption is then all of their images.
    """
    granularity = VIEWS.index(view)
    own = run.root[run.granularity == granularity]                 # (R,) roots that have this view
    images, words = toy_data.views(run.roots.take(own), view, s.pixels)
    n = s.eval_images
    chosen = torch.arange(n, device=s.device) % len(own)
    x0, tokens = images[chosen], words[chosen]
    e = torch.randn(x0.shape, generator=machine.seeded(s, 3), device=s.device)
    t = (torch.arange(n, device=s.device) + 0.5) / n
    same_caption = (tokens[:, None] == words).all(2)               # (n, R)
    u_star = fm.exact_velocity(fm.path(x0, e, t), t, images, same_caption)
    return x0, e, t, tokens, u_star


def errors_by_third(network, held, s):
    """[|v - u*|^2 / D] in the thirds of t: towards data, middle, towards noise."""
    thirds = zip(*(tensor.tensor_split(len(THIRDS)) for tensor in held))
    return [report.validate(network, third, s)["error"] for third in thirds]


def read(network, roots, split, view, scale, s):
    """{what: the share of samples in which the reader finds it}."""
    s = dataclasses.replace(s, guidance=scale)
    scenes = report.test_scenes(s, roots, "target", split, 4)
    _, tokens = toy_data.views(scenes, view, s.pixels)
    images = report.sample_images(network, tokens, s, machine.seeded(s, 5))
    found = toy_data.accuracies(images, scenes, view)
    return {name: report.share(found[name]) for name in READ}
