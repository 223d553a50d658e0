"""What the program needs and a reader of the method may skip: books, machine, report, pictures."""

import sys


def end_interrupts_in_one_sentence():
    """From here on Ctrl-C ends the program with one sentence, even while libraries are loaded."""
    usual = sys.excepthook

    def hook(kind, error, trace):
        if issubclass(kind, KeyboardInterrupt):
            print("train.py: interrupted before anything was begun", file=sys.stderr)
        else:
            usual(kind, error, trace)

    sys.excepthook = hook
