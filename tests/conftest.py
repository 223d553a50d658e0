"""For every test: the program's modules can be imported, one thread computes, no window opens."""

import multiprocessing
import sys
from pathlib import Path

import matplotlib
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
matplotlib.use("Agg")

# The tensors of the tests are tiny: several threads would spend their time waiting for each other.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def processes():
    """Starts processes, each a copy of one in which the libraries are loaded already."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs the processes and signals of Linux or macOS")
    context = multiprocessing.get_context("forkserver")
    libraries = ["torch", "torchvision.ops", "torchvision.transforms.v2.functional"]
    context.set_forkserver_preload([*libraries, "matplotlib.figure", "pytest"])
    return context
