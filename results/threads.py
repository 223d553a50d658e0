"""How fast training on a CPU is beside other busy processes, and what its threads do meanwhile.

    python results/threads.py --rounds 5 --out results/threads_cpu.md

Threads that wait for each other may spin, which is fast on an idle machine; where another process
has taken one of the cores, they spin in vain. OMP_WAIT_POLICY=passive lets them sleep instead. With
GOMP_SPINCOUNT=1000 they spin a thousand times before; both together are the default of train.py.
The cases without a word are as OpenMP has it.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
OPENMP = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
PASSIVE, SPINS = {"OMP_WAIT_POLICY": "passive"}, {"GOMP_SPINCOUNT": "1000"}
CASES = {
    "1 thread": {"OMP_NUM_THREADS": "1"},
    "1 thread, passive": {"OMP_NUM_THREADS": "1"} | PASSIVE,
    "2 threads": {"OMP_NUM_THREADS": "2"},
    "2 threads, passive": {"OMP_NUM_THREADS": "2"} | PASSIVE,
    "2 threads, passive after 1,000 spins": {"OMP_NUM_THREADS": "2"} | PASSIVE | SPINS,
}
BUSY = (0, 1, 2)
# A process that does nothing but compute, and ends with the one that started it.
LOOP = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"


# --- The work of a process of its own -------------------------------------------------------------

def measure_speeds(seconds):
    """Images/s of the default run of train.py, beside each number of busy processes in turn."""
    sys.path[0] = str(ROOT)
    import torch  # noqa: F401  loads OpenMP before our own default (support/__init__.py) is set
    import train
    from support import report
    run = train.Run(train.Settings(device="cpu"))
    for _ in range(3):                             # the first steps fill caches
        run.train_step()

    speeds = []
    for number in BUSY:
        busy = [subprocess.Popen([sys.executable, "-c", LOOP]) for _ in range(number)]
        time.sleep(0.5)                            # until they have begun
        before, start = report.images_until(run, run.step), time.perf_counter()
        while time.perf_counter() < start + seconds:
            run.train_step()
        elapsed = time.perf_counter() - start
        for process in busy:
            process.kill()
            process.wait()
        speeds.append((report.images_until(run, run.step) - before) / elapsed)
    return speeds


# --- All cases in turns ---------------------------------------------------------------------------

def speeds_of(case, seconds):
    """What a fresh process measures, whose OpenMP reads the case's variables when it is loaded."""
    others = {name: value for name, value in os.environ.items() if name not in OPENMP}
    command = [sys.executable, __file__, "--child", "--seconds", str(seconds)]
    done = subprocess.run(command, env=others | CASES[case], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def table(found):
    """Lines of markdown: the median of the rounds, and in brackets the slowest round."""
    lines = ["| images/s | " + " | ".join(f"beside {number} busy" for number in BUSY) + " |",
             "|---|" + "---|" * len(BUSY)]
    for case, rounds in found.items():
        cells = [f"{median(speeds):.0f} ({min(speeds):.0f})" for speeds in zip(*rounds)]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of all cases in turns (default 5)")
    parser.add_argument("--seconds", type=float, default=3.0, help="a measurement (default 3)")
    parser.add_argument("--out", type=Path, help="a file for the table")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child:
        print(json.dumps(measure_speeds(flags.seconds)))
        return

    found = {case: [] for case in CASES}
    for number in range(flags.rounds):
        for case, rounds in found.items():
            rounds.append(speeds_of(case, flags.seconds))
            print(f"round {number + 1}, {case}: {rounds[-1]}", file=sys.stderr, flush=True)
    where = f"{os.cpu_count()} CPU cores ({platform.machine()}), {platform.system()}"
    command = f"python results/threads.py --rounds {flags.rounds} --seconds {flags.seconds:g}"
    lines = [f"{where}; `{command}`: the default run of train.py (DiT), medians of the rounds and,",
             "in brackets, the slowest round.", "", *table(found)]
    print("\n".join(lines))
    if flags.out:
        flags.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
