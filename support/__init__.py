"""What the program needs and a reader of the method may skip: books, machine, report, pictures."""

import os
import signal

# The threads of torch sleep while they wait for each other, with GNU's OpenMP after 1,000 spins. By
# default they spin for long, which is several times slower where another process has taken one of
# the cores (results/threads_cpu.md). OpenMP reads this when torch is loaded; your own setting comes
# first.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


# What SIGINT (Ctrl-C) did before begin_program; None outside of a program.
usual_interrupt = None


def begin_program():
    """Before the libraries are loaded, which takes seconds, in a process that is a program's own.

    Ctrl-C ends it at once, with one sentence. An exception would not do: torch goes on without a
    library whose import is interrupted. What MPLBACKEND says, such as a notebook's window system,
    counts for nothing, since no window is opened.
    """
    global usual_interrupt

    def leave(*_):
        os.write(2, b"train.py: interrupted before anything was begun\n")
        os._exit(130)

    os.environ["MPLBACKEND"] = "agg"
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        usual_interrupt = signal.signal(signal.SIGINT, leave)


def end_beginning():
    """When the libraries are loaded, and the work begins: Ctrl-C is an exception again."""
    global usual_interrupt
    if usual_interrupt is not None:
        signal.signal(signal.SIGINT, usual_interrupt)
        usual_interrupt = None
