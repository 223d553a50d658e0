import os
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
torch.set_num_threads(1)                       # the tensors are tiny: more threads only wait for each other
sys.path.insert(0, str(Path(__file__).parent.parent))


# --- Two cores, two processes: when the whole suite is asked for, these files run beside the others ---

BESIDE, HALF = ("test_gpu.py", "test_speed.py", "test_train.py"), "SECOND_HALF_OF_THE_TESTS"


def pytest_collection_modifyitems(config, items):
    beside = [item for item in items if item.path.name in BESIDE]
    if HALF in os.environ or len({item.path for item in items}) < 10 or not beside or config.option.collectonly:
        return
    items[:] = [item for item in items if item.path.name not in BESIDE]
    config.printed = tempfile.TemporaryFile("w+")
    files = sorted({str(item.path) for item in beside})
    config.beside = subprocess.Popen([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files], env=os.environ | {HALF: "1"},
                                     cwd=config.rootpath, stdout=config.printed, stderr=subprocess.STDOUT)


def pytest_sessionfinish(session):
    beside = getattr(session.config, "beside", None)
    if beside and beside.wait():
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter, config):
    if hasattr(config, "beside"):
        config.printed.seek(0)
        terminalreporter.section(f"beside: {', '.join(BESIDE)}, in a process of their own")
        terminalreporter.write(config.printed.read())
