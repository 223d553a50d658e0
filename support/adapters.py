"""Low-rank adapters (--rank): the network is frozen, and a correction of each layer is trained.

A layer's matrix W becomes W + B A. A has `rank` rows and B as many columns, so that the correction
has no larger rank. With a small rank far fewer numbers are trained. Both are ordinary layers, so
the kernel and the interaction matrix of what is trained are as exact as those of all weights. B is
0 at first: then A has no gradient yet, and the first M is that of the B's alone.
"""

import torch
from torch import nn


class Adapted(nn.Module):
    """A frozen layer and its correction: layer(z) + B(A(z)), with B = 0 at first."""

    def __init__(self, layer, rank):
        super().__init__()
        self.layer = layer
        if isinstance(layer, nn.Conv2d):
            if layer.groups > 1 or layer.dilation != (1, 1):
                raise ValueError("an adapter needs a convolution without groups or dilation, not "
                                 f"{layer}")
            # A sees what the layer sees; B mixes A's channels at each place.
            self.A = nn.Conv2d(layer.in_channels, rank, layer.kernel_size, layer.stride,
                               layer.padding, bias=False, padding_mode=layer.padding_mode)
            self.B = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        else:
            self.A = nn.Linear(layer.in_features, rank, bias=False)
            self.B = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.B.weight)

    def forward(self, z):
        return self.layer(z) + self.B(self.A(z))


def add(model, s):
    """Freezes the model, and puts an adapter on each Linear and Conv2d layer. Twice is as once."""
    there_already = any(isinstance(module, Adapted) for module in model.modules())
    if s.rank == 0 or there_already:
        return
    model.requires_grad_(False)
    torch.manual_seed(s.seed)
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                setattr(module, name, Adapted(layer, s.rank).to(layer.weight))
