import sys
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
torch.set_num_threads(1)                       # the tensors are tiny: more threads only wait for each other
sys.path.insert(0, str(Path(__file__).parent.parent))
