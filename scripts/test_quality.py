#!/usr/bin/env python3
"""Tests of scripts/quality.py, and the quality bar that `tidemill train` must hold on a generated stream and on Open Bandit.

Runs the binary that `cargo build` made (or $TIDEMILL). The bar is small so that it runs in seconds; scripts/quality.py is the comparison.
"""

import csv
import json
import math
import pathlib
import random
import subprocess
import tempfile
import unittest

import quality

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Figures(unittest.TestCase):
    def test_auc_counts_pairs_and_ties_half(self):
        chance = random.Random(1)
        p = [chance.randrange(8) / 8 for _ in range(200)]
        y = [chance.random() < 0.3 for _ in p]
        pairs = [(a > b) + 0.5 * (a == b) for a, hit in zip(p, y) if hit for b, other in zip(p, y) if not other]
        self.assertAlmostEqual(quality.auc(p, y), sum(pairs) / len(pairs), places=12)
        self.assertEqual(quality.auc([0.1, 0.2], [1, 1]), 0.5)

    def test_figures_of_a_known_case(self):
        got = quality.judge([0.5, 0.25], [1, 0])
        self.assertAlmostEqual(got["logloss"], (math.log(2) - math.log(0.75)) / 2)
        self.assertAlmostEqual(got["ne"], got["logloss"] / math.log(2))
        self.assertAlmostEqual(got["calibration"], 0.75)
        self.assertEqual(got["auc"], 1.0)

    def test_both_ends_of_the_window_count_and_the_first_of_an_id(self):
        impressions = [{"id": i, "ts": t} for i, t in [("b", 5), ("a", 0), ("a", 3), ("c", 9), ("d", 10)]]
        clicks = [{"id": i, "ts": t} for i, t in [("a", 100), ("b", 106), ("c", 8), ("c", 9), ("x", 9)]]
        got = [(record["id"], y) for record, y in quality.join(impressions, clicks, 100)]
        self.assertEqual(got, [("a", 1), ("b", 0), ("c", 1), ("d", 0)])

    def test_durations(self):
        self.assertEqual([quality.seconds_of(t) for t in ("7h", "30m", "1h 30m", "250ms")], [25200, 1800, 5400, 0.25])

    def test_encoding_of_values(self):
        record = {"n": -5, "deep": [{"x": 1}, {"x": None}], "bag": ["a", "b", "c", "d"], "weights": {"a": 3, "b": 4, "c": 0}}
        values = lambda **feature: quality.values_of(record, feature)
        self.assertEqual(values(name="n", kind="numeric"), [("b-13", 1.0)])
        self.assertEqual(values(name="x", **{"from": "deep.0.x"}), [("1", 1.0)])
        self.assertEqual(values(name="x", **{"from": "deep.1.x"}), [("missing", 1.0)])
        self.assertEqual(values(name="bag", kind="multi"), [(c, 0.5) for c in "abcd"])
        self.assertEqual(values(name="weights", kind="multi"), [("a", 0.6), ("b", 0.8)])

    def test_summing_over_batches_of_one_is_learning_by_example(self):
        chance = random.Random(2)
        examples = [({"u": chance.randrange(20), "t": chance.sample("abcd", 2)}, int(chance.random() < 0.4)) for _ in range(300)]
        features = [{"name": "u"}, {"name": "t", "kind": "multi"}]
        data = quality.Encoded(examples, features, [{"of": ["u", "t"]}])
        one, other = (quality.adagrad(data, 0.1, 0.1, 0.3, True), quality.adagrad_summed(data, 0.1, 0.1, 0.3, True, 1))
        self.assertLess(abs(one - other).max(), 1e-9)
        self.assertGreater(abs(one - quality.adagrad(data, 0.1, 0.1, 0.3, False)).max(), 1e-3)


class Bar(unittest.TestCase):
    """What `tidemill train` must reach with the shipped configs."""

    def setUp(self):
        self.binary = quality.tested_binary()
        self.assertTrue(self.binary, "no tidemill binary: run cargo build")
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.scratch = pathlib.Path(folder.name)

    def test_generated_stream(self):
        out = self.scratch / "stream"
        command = [str(self.binary), "generate", "--out", str(out), "--zst", "--partitions", "2"]
        for option in ("impressions=60000 users=3000 items=300 rate=50 ctr=0.1 delay-sigma=2 duplicates=0.02 orphans=0.05 "
                       "garbage=0.01").split():
            command += ["--" + option.split("=")[0], option.split("=")[1]]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        stats = json.loads((out / "stats.json").read_text())
        scores, report = quality.tidemill(self.binary, ROOT / "configs/generated.toml", quality.event_files(out), self.scratch)

        with quality.open_text(out / "truth.csv.zst") as lines:
            truth = {row["id"]: int(row["y"]) for row in csv.DictReader(lines)}
        self.assertEqual({key: y for key, (_, y) in scores.items()}, truth, "every impression once, with its true label")
        counts = report["counts"]
        self.assertEqual(counts["duplicates"], stats["duplicate_impressions"])
        self.assertEqual(counts["rejected"], stats["garbage_impressions"])
        self.assertEqual(counts["clicks_attributed"], stats["positives"])

        got = quality.judge(*zip(*scores.values()))
        reached = (stats["constant_logloss"] - got["logloss"]) / (stats["constant_logloss"] - stats["best_logloss"])
        print(f"generated stream: {got}, {reached:.3f} of what can be known")
        self.assertAlmostEqual(got["logloss"], report["metrics"]["logloss"], places=5)
        self.assertAlmostEqual(got["auc"], report["metrics"]["auc"], places=3)
        # Vowpal Wabbit reaches 0.43 with its default and 0.45 with the best of several rates, one pass, same features.
        self.assertGreater(reached, 0.42)
        self.assertTrue(0.95 < got["calibration"] < 1.05, got)

    def test_open_bandit(self):
        scores, _ = quality.tidemill(self.binary, ROOT / "configs/obd.toml", quality.event_files("obd"), self.scratch)
        self.assertEqual(len(scores), 40_000)
        p, y = zip(*scores.values())
        self.assertEqual(sum(y), 207)
        got = quality.judge(p, y)
        print(f"open bandit: {got}")
        self.assertLess(got["logloss"], 0.0324 + 0.0005)
        self.assertTrue(0.8 < got["calibration"] < 1.25, got)

    def test_kuairand(self):
        try:
            files = quality.event_files("kuairand")
        except SystemExit as missing:
            self.skipTest(str(missing))
        scores, _ = quality.tidemill(self.binary, ROOT / "configs/kuairand.toml", files, self.scratch)
        p, y = zip(*scores.values())
        self.assertEqual((len(y), sum(y)), (91_805, 41_096))
        got = quality.judge(p, y)
        print(f"kuairand: {got}")
        self.assertLess(got["logloss"], 0.610)
        self.assertGreater(got["auc"], 0.712)


if __name__ == "__main__":
    unittest.main(verbosity=2)
