"""For every test: the program's modules can be imported, one thread computes, no window opens."""

import multiprocessing
import os
import sys
from pathlib import Path

import matplotlib
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
matplotlib.use("Agg")

# The tensors of the tests are tiny: several threads would spend their time waiting for each other.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"            # for the processes that tests start


class Processes:
    """Starts processes, each a copy of one in which the libraries are loaded already.

    A copy of the tests' own process would not do: where there is a GPU, gradients cannot be
    computed in a copy of a process that has computed some.
    """

    def __init__(self):
        self.context = multiprocessing.get_context("forkserver")
        libraries = ["torch", "torchvision.ops", "torchvision.transforms.v2.functional"]
        self.context.set_forkserver_preload([*libraries, "matplotlib.figure", "pytest"])

    def start(self, function, *arguments):
        """A new process that calls a function of a test module."""
        process = self.context.Process(target=function, args=arguments, daemon=True)
        process.start()
        return process

    def status_of(self, process, seconds=120):
        """0, 1 after an error, or minus a signal; None if it had to be killed, after too long."""
        process.join(seconds)
        status = process.exitcode
        process.kill()
        process.join()
        return status


@pytest.fixture(scope="session")
def processes():
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs the processes and signals of Linux or macOS")
    return Processes()
