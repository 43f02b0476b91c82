#!/usr/bin/env python3
"""The table of scripts/bench.sh: one row a figure, from all benchmarks.

    cargo bench | scripts/bench_table.py micro ROWS      appends the figures in what cargo bench printed
    scripts/bench_table.py print ROWS                    prints all

A row is a line of JSON: part, name, figure, unit, and if something was measured beside it in the same run: peer, peer_figure. The ratio
is figure / peer_figure, so of rates a large one is good, and of times a small one.
"""

import json
import pathlib
import re
import sys

# Of the micro benches: what is measured beside what.
BESIDE = {
    "decode ten_fields": "decode sonic_rs_typed",
    "logistic learn_and_measure": "logistic learn",
    "score slots_by_index": "score slots_by_interpolation",
}


class Rows:
    """Rows of one part, appended to a file if there is one."""

    def __init__(self, part, path=None):
        self.part, self.path, self.rows = part, path, []

    def add(self, name, figure, unit, peer=None, peer_figure=None):
        row = {"part": self.part, "name": name, "figure": figure, "unit": unit}
        if peer is not None:
            row |= {"peer": peer, "peer_figure": peer_figure}
        self.rows.append(row)
        if self.path:
            with open(self.path, "a") as out:
                out.write(json.dumps(row) + "\n")

    def print(self):
        print_rows(self.rows)


def number(x):
    """Three digits that say something."""
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}"


def print_rows(rows):
    cells = [["", "figure", "unit", "beside it", "", "ratio"]]
    for row in rows:
        line = [f"{row['part']}: {row['name']}", number(row["figure"]), row["unit"], "", "", ""]
        if "peer" in row:
            line[3:] = [row["peer"], number(row["peer_figure"]), f"{row['figure'] / row['peer_figure']:.2f}"]
        cells.append(line)
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        to_left = (0, 2, 3)
        print("  ".join(cell.ljust(w) if i in to_left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))).rstrip())


UNITS = {"ns": 1e-3, "µs": 1, "ms": 1e3, "s": 1e6, "item/s": 1e-6, "Kitem/s": 1e-3, "Mitem/s": 1, "Gitem/s": 1e3}


def micro_figures(lines):
    """{bench: (figure, unit)} of what cargo bench printed: items a second where divan counts them, else the time (medians); of
    benches/source.rs, which prints a table of its own, lines a second."""
    figures, group, bench = {}, None, None
    for line in lines:
        if head := re.match(r"(\w+) +fastest", line):
            group = head[1]
        elif named := re.match(r"[├╰]─ (\w+) ", line):
            bench = f"{group} {named[1]}"
        elif read := re.match(r"(\w.*?) +[0-9]+ MiB +([0-9]+) file\(s\) +([0-9]+) decoder\(s\) +([0-9.]+)$", line):
            figures[f"source {read[1]}: files {read[2]}, decoders {read[3]}"] = (float(read[4]), "M lines/s")
        cells = re.findall(r"([0-9.]+) (ns|µs|ms|s|[KMG]?item/s)\b", line)  # fastest, slowest, median, mean
        if bench and len(cells) == 4:
            value, unit = cells[2]
            figures[bench] = (float(value) * UNITS[unit], "M items/s" if "item" in unit else "us")
    return figures


def micro(path):
    lines = []
    for line in sys.stdin:
        print(line, end="", flush=True)
        lines.append(line)
    figures, rows = micro_figures(lines), Rows("micro", path)
    for bench, (figure, unit) in figures.items():
        beside = BESIDE.get(bench)
        if beside in figures:
            rows.add(bench, figure, unit, beside.split()[1], figures[beside][0])
        else:
            rows.add(bench, figure, unit)
    if not figures:
        sys.exit("no figures in what was read; is it the output of cargo bench?")


def main():
    if len(sys.argv) != 3 or sys.argv[1] not in ("micro", "print"):
        sys.exit(__doc__)
    path = pathlib.Path(sys.argv[2])
    if sys.argv[1] == "micro":
        micro(path)
    else:
        print_rows([json.loads(line) for line in path.read_text().splitlines()])


if __name__ == "__main__":
    main()
