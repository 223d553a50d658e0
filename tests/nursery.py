"""Processes for the tests that need one of their own, without the seconds that loading torch takes.

One process is forked before the first test, when the libraries are loaded and nothing is computed
yet. It forks all others. A later fork of the tests' own process would not do: where there is a GPU,
gradients cannot be computed in a copy of a process that has computed some.
"""

import functools
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback


def serve(connection):
    """The work of the first process: it starts others and says how they ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)                   # it ends when the tests end
    gc.freeze()                                # no new process looks through the libraries' objects
    while True:
        try:
            request, argument = connection.recv()
        except EOFError:
            os._exit(0)
        if request == "start":
            pid = os.fork()
            if pid == 0:
                connection.close()
                do(argument)
            connection.send(pid)
        if request == "status":
            ended, status = os.waitpid(argument, os.WNOHANG)
            connection.send(os.waitstatus_to_exitcode(status) if ended else None)


def do(work):
    """What a new process does, and its end."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = 1
    try:
        # Only here are the modules of the tests loaded, so that one process knows none of another.
        function, arguments = pickle.loads(work)
        function(*arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class Nursery:
    """The tests' end of the line to the first process."""

    def __init__(self):
        self.connection, there = multiprocessing.Pipe()
        if os.fork() == 0:
            self.connection.close()
            serve(there)
        there.close()

    def ask(self, request, argument):
        self.connection.send((request, argument))
        return self.connection.recv()

    def start(self, function, *arguments):
        """A new process that calls a function of a test module."""
        pid = self.ask("start", pickle.dumps((function, arguments)))
        return Process(self, pid)


@functools.cache
def the_nursery():
    """The one of these tests, forked at the first call; None where processes cannot be forked."""
    return Nursery() if hasattr(os, "fork") else None


class Process:
    """A process of the nursery."""

    def __init__(self, nursery, pid):
        self.nursery, self.pid = nursery, pid
        self.found = None

    def status(self):
        """None while it runs, then 0, 1 after an error, or minus the signal that killed it."""
        if self.found is None:
            self.found = self.nursery.ask("status", self.pid)
        return self.found

    def wait(self, seconds=120):
        """Its status at its end. What takes too long is killed."""
        end = time.monotonic() + seconds
        while self.status() is None:
            if time.monotonic() > end:
                self.kill()
            time.sleep(0.01)
        return self.status()

    def kill(self):
        if self.status() is None:
            os.kill(self.pid, signal.SIGKILL)
