"""The table of the default run, from the report.json of each run in results/runs.

    python results/tabulate.py

prints it; results/details.md shows it, and a test compares the two.
"""

import json
from pathlib import Path

RUNS = Path(__file__).parent / "runs"
HEAD = ("network", "captions", "view", "joint accuracy", "reader's ceiling", "valid scenes", "loss",
        "its floor", "error \\|v - u\\*\\|²/D")


def table(folder=RUNS):
    """The lines of a Markdown table: one row for each network, model, split and view."""
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for network in ("dit", "unet"):
        reports = [run["rows"] for run in runs if run["settings"]["model"] == network]
        # The seeds' reports have the same rows in the same order.
        for seeds in zip(*reports):
            lines.append(f"| {network} | {line(seeds)} |")
    return lines


def line(seeds):
    """The same row of every seed's report, as one row of the table."""
    first = seeds[0]
    captions = f"{first['model']}, {first['domain']} {first['split'].replace('_', ' ')}"
    joint = [row["joint"] for row in seeds]
    shown = f"{mean(joint):.1%}"
    if len(joint) > 1:
        every_seed = ", ".join(f"{100 * share:.1f}" for share in joint)
        shown += f" ({every_seed})"
    cells = [captions, first["view"], shown]
    for name in ("ceiling", "valid"):
        cells.append(f"{mean([row[name] for row in seeds]):.1%}")
    for name in ("loss", "floor", "error"):
        cells.append(f"{mean([row[name] for row in seeds]):.4f}")
    return " | ".join(cells)


def mean(values):
    return sum(values) / len(values)


if __name__ == "__main__":
    print("\n".join(table()))
