"""Prints the README's table of results from the report.json of each run: python results/tabulate.py"""

import json
from pathlib import Path


def share(values):
    """The mean over the seeds, and each of them."""
    return f"{sum(values) / len(values):.1%} ({', '.join(f'{100 * value:.1f}' for value in values)})"


def table(folder=Path(__file__).parent / "runs"):
    """The lines of a Markdown table: one row for each network, model, split and view."""
    runs = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    lines = ["| network | captions | view | joint accuracy | reader's ceiling | valid scenes | loss | its floor | error \\|v - u\\*\\|²/D |",
             "|---|---|---|---|---|---|---|---|---|"]
    for network in ("dit", "unet"):
        reports = [run["rows"] for run in runs if run["settings"]["model"] == network]
        for rows in zip(*reports):
            of = lambda name: [row[name] for row in rows]
            mean = lambda name: sum(of(name)) / len(rows)
            captions = f"{rows[0]['model']}, {rows[0]['domain']} {rows[0]['split'].replace('_', ' ')}"
            lines.append(f"| {network} | {captions} | {rows[0]['view']} | {share(of('joint'))} | {mean('ceiling'):.1%} | {mean('valid'):.1%}"
                         f" | {mean('loss'):.4f} | {mean('floor'):.4f} | {mean('error'):.4f} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
