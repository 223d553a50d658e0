"""What the program needs and a reader of the method may skip: books, machine, report, pictures."""

import os
import sys

# The threads of torch sleep while they wait for each other. By default they spin, which is a little
# faster on an idle machine, and many times slower where another process has taken one of the cores
# (results/threads_cpu.md). OpenMP reads this when torch is loaded; your own setting comes first.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def end_interrupts_in_one_sentence():
    """From here on Ctrl-C ends the program with one sentence, even while libraries are loaded."""
    usual = sys.excepthook

    def hook(kind, error, trace):
        if issubclass(kind, KeyboardInterrupt):
            print("train.py: interrupted before anything was begun", file=sys.stderr)
        else:
            usual(kind, error, trace)

    sys.excepthook = hook
