#!/usr/bin/env python3
"""Tests of the benches in scripts/: the table, and scripts/bench_serve.py from end to end, small. Speeds are not judged.

Runs the binary and the load generator that `cargo build` and `cargo test` made (or $TIDEMILL and examples/load beside it).
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

import bench_table
import quality

ROOT = pathlib.Path(__file__).resolve().parent.parent

DIVAN = """
Timer precision: 20 ns
score                        fastest       │ slowest       │ median        │ mean          │ samples │ iters
├─ body_to_scores            41.08 µs      │ 102.1 µs      │ 42.3 µs       │ 44.87 µs      │ 100     │ 100
│                            2.434 Mitem/s │ 979.1 Kitem/s │ 2.363 Mitem/s │ 2.228 Mitem/s │         │
├─ slots_by_index            11 ms         │ 14 ms         │ 12 ms         │ 12 ms         │ 100     │ 100
│                            2.3 Mitem/s   │ 1.8 Mitem/s   │ 2.1 Mitem/s   │ 2.1 Mitem/s   │         │
╰─ slots_by_interpolation    110 ms        │ 140 ms        │ 120 ms        │ 120 ms        │ 100     │ 100
                             232.7 Kitem/s │ 182.8 Kitem/s │ 210 Kitem/s   │ 213.3 Kitem/s │         │

Timer precision: 20 ns
other           fastest       │ slowest       │ median        │ mean          │ samples │ iters
╰─ only_time    1.5 ns        │ 2 ns          │ 1.75 ns       │ 1.8 ns        │ 100     │ 100

2000000 lines of 250 bytes; million lines a second, best of 3
zstd -3   148 MiB  1 file(s)  2 decoder(s)    2.79
"""


class Table(unittest.TestCase):
    def test_the_figures_of_cargo_bench_are_read(self):
        self.assertEqual(
            bench_table.micro_figures(DIVAN.splitlines()),
            {
                "score body_to_scores": (2.363, "M items/s"),
                "score slots_by_index": (2.1, "M items/s"),
                "score slots_by_interpolation": (0.21, "M items/s"),
                "other only_time": (0.00175, "us"),
                "source zstd -3: files 1, decoders 2": (2.79, "M lines/s"),
            },
        )

    def test_rows_from_all_parts_come_out_as_one_table_with_ratios(self):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "rows.jsonl"
            command = [sys.executable, ROOT / "scripts/bench_table.py"]
            subprocess.run([*command, "micro", path], input=DIVAN, text=True, check=True, stdout=subprocess.DEVNULL)
            bench_table.Rows("serving", path).add("p99", 300.0, "us", "the other", 1200.0)
            out = subprocess.run([*command, "print", path], text=True, check=True, capture_output=True).stdout
        lines = [line.split() for line in out.splitlines()]
        self.assertIn("micro: score slots_by_index 2.1 M items/s slots_by_interpolation 0.21 10.00".split(), lines)
        self.assertIn("serving: p99 300 us the other 1200 0.25".split(), lines)
        self.assertEqual(len(lines), 7)


class Serving(unittest.TestCase):
    def test_both_servers_answer_the_same_candidates_and_every_figure_is_there(self):
        binary = quality.tested_binary()
        with tempfile.TemporaryDirectory() as folder:
            rows = pathlib.Path(folder) / "rows.jsonl"
            options = ["--impressions", "40000", "--candidates", "20", "--rounds", "1", "--seconds", "1", "--tidemill", binary, "--rows", rows]
            ran = subprocess.run([sys.executable, ROOT / "scripts/bench_serve.py", *map(str, options)], text=True, capture_output=True,
                                 env=os.environ | {"CARGO_TARGET_DIR": folder})
            self.assertEqual(ran.returncode, 0, ran.stdout + ran.stderr)
            rows = [json.loads(line) for line in rows.read_text().splitlines()]
        print(ran.stdout)
        self.assertEqual(len(rows), 8)
        for row in rows:
            self.assertTrue(row["figure"] > 0 and row["peer_figure"] > 0, row)


if __name__ == "__main__":
    unittest.main(verbosity=2)
