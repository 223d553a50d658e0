"""For every test: the program's modules can be imported, one thread computes, no window opens."""

import sys
from pathlib import Path

import matplotlib
import matplotlib.figure  # noqa: F401
import pytest
import torch
import torchvision.transforms.v2.functional  # noqa: F401

from nursery import the_nursery

sys.path.insert(0, str(Path(__file__).parent.parent))
matplotlib.use("Agg")

# The tensors of the tests are tiny: several threads would spend their time waiting for each other.
torch.set_num_threads(1)

# Here, where the libraries are loaded, and before anything is computed.
the_nursery()


@pytest.fixture(scope="session")
def nursery():
    """Starts processes that have the libraries loaded already."""
    if the_nursery() is None:
        pytest.skip("needs the processes and signals of Linux or macOS")
    return the_nursery()
