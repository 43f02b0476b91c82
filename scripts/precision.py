#!/usr/bin/env python3
"""What it costs to publish rows as f16 or int8: size of a full, and log loss on what comes after.

    scripts/precision.py [-n 1000000] [--model two_tower] [--seed 1]

Generates a stream, trains one model on its first four fifths by event time, publishes it at each precision, and scores the last fifth with
`tidemill score`. The model is the same each time (the digests are compared); only what is published differs. Run with .venv/bin/python.
"""

import argparse
import csv
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from quality import ROOT, auc, tested_binary


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", "--impressions", type=int, default=1_000_000)
    parser.add_argument("--model", default="two_tower", choices=["two_tower", "logistic"])
    parser.add_argument("--rate", default="500", help="impressions a second of event time (default: 500)")
    parser.add_argument("--seed", default="1")
    args = parser.parse_args()
    binary = tested_binary()

    def tidemill(*words):
        done = subprocess.run([binary, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"`tidemill {' '.join(map(str, words))}` ended with {done.returncode}:\n{done.stderr}")
        return done.stdout

    with tempfile.TemporaryDirectory(prefix="tidemill-precision-") as scratch:
        home = pathlib.Path(scratch)
        stream = home / "stream"
        tidemill("generate", "--out", stream, "-n", args.impressions, "--rate", args.rate, "--seed", args.seed)
        with open(stream / "truth.csv") as file:
            clicked = {row["id"]: int(row["y"]) for row in csv.DictReader(file)}
        lines = []
        with open(stream / "impressions-000.jsonl", errors="replace") as file:
            for line in file:
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if isinstance(record, dict) and isinstance(record.get("ts"), int) and str(record.get("id")) in clicked:
                    lines.append((record["ts"], line))
        lines.sort(key=lambda line: line[0])
        until = lines[len(lines) * 4 // 5][0]
        (home / "later.jsonl").write_text("".join(line for time, line in lines if time >= until))

        digests = set()
        print(f"{args.model}, {args.impressions} impressions, seed {args.seed}: trained on 4/5, scored on the last fifth")
        print(f"{'':6} {'bytes of a full':>16} {'of f32':>7} {'log loss':>10} {'more':>10} {'AUC':>8} {'golden logits move':>19}")
        for precision in "f32", "f16", "int8":
            places = {
                "impressions.source.paths": [str(stream / "impressions-000.jsonl")],
                "clicks.source.paths": [str(stream / "clicks-000.jsonl")],
                "checkpoint.dir": str(home / f"checkpoints-{precision}"),
                "snapshots.store": str(home / precision),
                "snapshots.precision": precision,
                "snapshots.deltas": 0,
                "snapshots.keep": 1,
                "publish.every": "1000d",
                "model.kind": args.model,
            }
            sets = [part for key, value in places.items() for part in ("--set", f"{key}={json.dumps(value)}")]
            run = json.loads(tidemill("train", "-c", "configs/generated.toml", "--until", until, "--json", *sets))
            digests.add(run["model_digest"])
            manifest = json.loads(tidemill("snapshots", "show", "--store", home / precision, "--json"))
            scores = csv.DictReader(tidemill("score", "--store", home / precision, "--as-logged", home / "later.jsonl").splitlines())
            y, p = np.array([(clicked[row["id"]], float(row["prediction"])) for row in scores]).T
            loss = float(-np.mean(np.where(y == 1, np.log(p), np.log1p(-p))))
            size = manifest["objects"][0]["length"]
            if precision == "f32":
                whole, best = size, loss
            moved = manifest["rounding"]
            print(f"{precision:6} {size:16,} {size / whole:7.2f} {loss:10.6f} {loss - best:+10.6f} {auc(p, y):8.5f} {moved:19.2g}", flush=True)
        if len(digests) != 1:
            sys.exit(f"the model is not the same at each precision: {digests}")


if __name__ == "__main__":
    main()
