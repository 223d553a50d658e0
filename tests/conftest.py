"""For every test: the program's modules can be imported, one thread computes, no window opens."""

import sys
from pathlib import Path

import matplotlib
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
matplotlib.use("Agg")

# The tensors of the tests are tiny: several threads would spend their time waiting for each other.
torch.set_num_threads(1)
