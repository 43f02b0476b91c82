#!/usr/bin/env python3
"""One-pass quality of Tidemill beside Vowpal Wabbit and plain AdaGrad, on the same examples in the same order.

    scripts/quality.py kuairand                  the shared KuaiRand days (see below where they are looked for)
    scripts/quality.py obd                       tests/data/obd
    scripts/quality.py DIR                       a directory written by `tidemill generate`

Every learner sees each example once, predicts before it learns, and is judged on all predictions: log loss, AUC, normalised entropy
(log loss over that of the best constant), calibration (sum of predictions over sum of labels). All figures are computed here, from (p, y).

Features and crosses are those of the TOML config, encoded alike for all: categories as they are, numbers as signed log2 buckets, bags
scaled to length 1. Examples: distinct ids (first in event-time order), label 1 if a click came within `join.window` of the impression.
Learning rates of the others are the best of the lists printed with them; Tidemill runs with what its config says, that is the defaults.

KuaiRand is not in the repository (share-alike licence): it is read from $TIDEMILL_KUAIRAND, else from ../shared/data/kuairand.
Run with .venv/bin/python (scripts/test.sh makes it).
"""

import argparse
import csv
import functools
import gzip
import io
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import tomllib

import numpy as np
import xxhash

ROOT = pathlib.Path(__file__).resolve().parent.parent
BITS = 24

VW_RATES = {"vw": ("-l", [0.1, 0.2, 0.35, 0.5, 0.8]), "vw --ftrl": ("--ftrl_alpha", [0.005, 0.02, 0.05, 0.1, 0.2, 0.3])}
ADAGRAD_RATES = [0.02, 0.03, 0.05, 0.08, 0.12]
BATCHES = [64, 256, 1024]
# Kernel of DESIGN section 5 without default rows, for the comparison of per-example with summed gradients.
KERNEL = {"a": 0.06, "n0": 0.15}


# --- reading -------------------------------------------------------------------------------------------------------


def open_text(path):
    path = str(path)
    if path.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8", errors="replace")
    if path.endswith(".zst"):
        import zstandard

        return io.TextIOWrapper(zstandard.open(path, "rb"), encoding="utf-8", errors="replace")
    return open(path, encoding="utf-8", errors="replace")


def records(paths):
    """The records of JSON-lines files; lines that are none (generated garbage) are left out."""
    for path in paths:
        with open_text(path) as lines:
            for line in lines:
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if isinstance(record, dict) and record.get("id") is not None and isinstance(record.get("ts"), int):
                    yield record


def event_files(source):
    """(impression files, click files) of `kuairand`, `obd` or a directory."""
    if source == "kuairand":
        where = pathlib.Path(os.environ.get("TIDEMILL_KUAIRAND") or ROOT.parent / "shared/data/kuairand")
        if not (where / "impressions.jsonl.gz").is_file():
            sys.exit(f"KuaiRand is not at `{where}`. It is not part of the repository; set TIDEMILL_KUAIRAND to its directory.")
    elif source == "obd":
        where = ROOT / "tests/data/obd"
    else:
        where = pathlib.Path(source)
    found = [sorted(where.glob(f"{kind}*.jsonl*")) for kind in ("impressions", "clicks")]
    if not all(found):
        sys.exit(f"`{where}` holds no impressions*.jsonl and clicks*.jsonl")
    return found


def seconds_of(text):
    units = {"ms": 0.001, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "day": 86400, "days": 86400}
    total, number, unit = 0.0, "", ""
    for c in text.replace(" ", "") + "\0":
        if c.isalpha():
            unit += c
            continue
        if unit:
            total, number, unit = total + float(number) * units[unit], "", ""
        number += c
    return total


def join(impressions, clicks, window_ms):
    """[(record, label)] in event order: distinct ids, the first in (ts, position in the files) counts."""
    clicked = {}
    for click in clicks:
        clicked.setdefault(str(click["id"]), []).append(click["ts"])
    seen, examples = set(), []
    for record in sorted(impressions, key=lambda r: r["ts"]):  # stable
        key = str(record["id"])
        if key in seen:
            continue
        seen.add(key)
        examples.append((record, int(any(0 <= at - record["ts"] <= window_ms for at in clicked.get(key, ())))))
    return examples


# --- encoding ------------------------------------------------------------------------------------------------------


def look_up(record, path):
    value = record
    for key in path.split("."):
        if isinstance(value, list):
            value = value[int(key)] if int(key) < len(value) else None
        elif isinstance(value, dict):
            value = value.get(key)
        else:
            return None
    return value


def bucket(x):
    """Signed log2 bucket: 0 near zero, else sign(x) (1 + floor(log2 |x|) + 10)."""
    if abs(x) < 2.0**-10:
        return 0
    return int(math.copysign(1 + math.frexp(abs(x))[1] - 1 + 10, x))


def values_of(record, feature):
    """[(text, weight)] of a feature: one entry with weight 1, or a bag of length 1. Missing is a value of its own."""
    value = look_up(record, feature.get("from", feature["name"]))
    kind = feature.get("kind", "categorical")
    if kind == "numeric":
        return [("missing" if value is None else f"b{bucket(float(value))}", 1.0)]
    if kind in ("multi", "sequence"):
        bag = [] if value is None else list(value.items()) if isinstance(value, dict) else [(v, 1.0) for v in value]
        bag = [(str(v), float(w)) for v, w in bag if w][: feature.get("max_len", 64)]
        norm = math.sqrt(sum(w * w for _, w in bag))
        return [(v, w / norm) for v, w in bag] if bag else [("missing", 1.0)]
    return [("missing" if value is None else str(value), 1.0)]


LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


@functools.lru_cache(maxsize=1 << 20)
def vw_token(value):
    # Vowpal Wabbit takes a token of digits as an index, not as a text: a letter goes before.
    return "v" + "".join("_" if c in " :|\t\n\r" else c for c in value)


def vw_line(parts, y):
    """An example as Vowpal Wabbit's text: one namespace per feature, named by a letter."""
    text = ["1" if y else "-1"]
    for letter, part in zip(LETTERS, parts, strict=False):
        text.append(f" |{letter}")
        text += [f" {vw_token(v)}" if w == 1.0 else f" {vw_token(v)}:{w:.6g}" for v, w in part]
    return "".join(text)


def interactions(features, crosses):
    """The crosses as Vowpal Wabbit's --interactions."""
    if len(features) > len(LETTERS):
        sys.exit(f"{len(features)} features: Vowpal Wabbit tells only {len(LETTERS)} namespaces apart")
    letter = dict(zip((feature["name"] for feature in features), LETTERS))
    return ["".join(letter[name] for name in cross["of"]) for cross in crosses]


class Encoded:
    """Examples as rows of a table of 2^24: `rows[starts[i]:starts[i+1]]` and `values` alike; also as VW text."""

    def __init__(self, examples, features, crosses):
        self.labels = np.array([y for _, y in examples], dtype=np.float64)
        place = {feature["name"]: k for k, feature in enumerate(features)}
        pairs = [[place[name] for name in cross["of"]] for cross in crosses]
        self.interactions = interactions(features, crosses)
        row_cache = {}
        mask = (1 << BITS) - 1

        def row(key):
            known = row_cache.get(key)
            if known is None:
                known = row_cache[key] = xxhash.xxh3_64_intdigest(repr(key).encode()) & mask
            return known

        rows, values, starts, cross_from, lines = [], [], [0], [], []
        for record, y in examples:
            parts = [values_of(record, feature) for feature in features]
            for k, part in enumerate(parts):
                for v, w in part:
                    rows.append(row((k, v)))
                    values.append(w)
            cross_from.append(len(rows))
            for n, pair in enumerate(pairs):
                combined = [((n, "x"), 1.0)]
                for k in pair:
                    combined = [((*key, v), w * u) for key, w in combined for v, u in parts[k]]
                for key, w in combined:
                    rows.append(row(key))
                    values.append(w)
            starts.append(len(rows))
            lines.append(vw_line(parts, y))
        self.rows, self.values = np.array(rows, dtype=np.int64), np.array(values)
        self.starts, self.cross_from, self.lines = starts, cross_from, lines

    def __len__(self):
        return len(self.labels)

    def span(self, i, crosses):
        return self.starts[i], self.starts[i + 1] if crosses else self.cross_from[i]


# --- judging -------------------------------------------------------------------------------------------------------


def auc(p, y):
    """Probability that a positive is ranked above a negative; ties count half. 0.5 where one class is missing."""
    p, y = np.asarray(p), np.asarray(y) > 0.5
    hits, misses = int(y.sum()), int((~y).sum())
    if not hits or not misses:
        return 0.5
    _, inverse, counts = np.unique(p, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2.0
    return (ranks[inverse][y].sum() - hits * (hits + 1) / 2.0) / (hits * misses)


def judge(p, y):
    p = np.clip(np.asarray(p, dtype=np.float64), 1e-7, 1 - 1e-7)
    y = np.asarray(y, dtype=np.float64)
    loss = -np.mean(y * np.log(p) + (1 - y) * np.log1p(-p))
    rate = y.mean()
    entropy = -(rate * math.log(rate) + (1 - rate) * math.log1p(-rate)) if 0 < rate < 1 else 0.0
    return {
        "logloss": float(loss),
        "auc": float(auc(p, y)),
        "ne": float(loss / entropy) if entropy else float("nan"),
        "calibration": float(p.sum() / y.sum()) if y.sum() else float("inf"),
    }


# --- learners ------------------------------------------------------------------------------------------------------


def sigmoid(z):
    return 1.0 / (1.0 + np.exp(-np.clip(z, -35, 35)))


def adagrad(data, rate, n0, prior, crosses):
    """Hashed logistic regression, example by example: n += g^2; w -= rate g / sqrt(n0 + n)."""
    w, n = np.zeros(1 << BITS), np.full(1 << BITS, n0)
    bias, bias_n = math.log(prior / (1 - prior)), n0
    out = np.empty(len(data))
    rows, values, labels = data.rows, data.values, data.labels
    for i in range(len(data)):
        a, b = data.span(i, crosses)
        r, v = rows[a:b], values[a:b]
        wr = w[r]
        p = 1.0 / (1.0 + math.exp(-min(max(bias + float(wr @ v), -35.0), 35.0)))
        out[i] = p
        g = p - labels[i]
        gv = g * v
        nr = n[r] + gv * gv
        n[r] = nr
        w[r] = wr - rate * gv / np.sqrt(nr)
        bias_n += g * g
        bias -= rate * g / math.sqrt(bias_n)
    return out


def adagrad_summed(data, rate, n0, prior, crosses, batch):
    """The same kernel on gradients summed over a mini-batch: predict the batch, then one step per row."""
    w, n = np.zeros(1 << BITS), np.full(1 << BITS, n0)
    bias, bias_n = math.log(prior / (1 - prior)), n0
    out = np.empty(len(data))
    for first in range(0, len(data), batch):
        last = min(first + batch, len(data))
        spans = [data.span(i, crosses) for i in range(first, last)]
        r = np.concatenate([data.rows[a:b] for a, b in spans])
        v = np.concatenate([data.values[a:b] for a, b in spans])
        owner = np.repeat(np.arange(last - first), [b - a for a, b in spans])
        p = sigmoid(bias + np.bincount(owner, w[r] * v, minlength=last - first))
        out[first:last] = p
        g = p - data.labels[first:last]
        touched, inverse = np.unique(r, return_inverse=True)
        total = np.bincount(inverse, g[owner] * v)
        n[touched] += total * total
        w[touched] -= rate * total / np.sqrt(n[touched])
        bias_n += g.sum() ** 2
        bias -= rate * g.sum() / math.sqrt(bias_n)
    return out


def vowpal_wabbit(data, text, options, crosses, scratch):
    """One pass of Vowpal Wabbit over the text; its predictions are made before it learns from an example."""
    out = pathlib.Path(scratch) / "vw.out"
    command = [sys.executable, "-m", "vowpalwabbit", "-d", str(text), "-p", str(out), "-b", str(BITS), "--quiet"]
    command += ["--loss_function", "logistic", "--link", "logistic", *options]
    for interaction in data.interactions if crosses else []:
        command += ["--interactions", interaction]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    p = np.loadtxt(out)
    assert len(p) == len(data), f"Vowpal Wabbit gave {len(p)} predictions for {len(data)} examples"
    return p


def tidemill(binary, config, files, scratch, more=()):
    """`tidemill train` over the same files: its (id, prediction, label) lines, and its own report."""
    out = pathlib.Path(scratch) / "predictions.csv"
    command = [str(binary), "train", "-c", str(config), "--until-end", "--json", "--predictions", str(out)]
    settings = [f"{stream}.source.paths={json.dumps([str(p) for p in paths])}" for stream, paths in zip(("impressions", "clicks"), files)]
    settings += [f"checkpoint.dir={json.dumps(f'{scratch}/checkpoints')}", f"snapshots.store={json.dumps(f'{scratch}/snapshots')}", *more]
    for setting in settings:
        command += ["--set", setting]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(f"`{' '.join(command)}` failed with {done.returncode}:\n{done.stderr[-3000:]}")
    with open(out, newline="") as lines:
        rows = [row for row in csv.reader(lines) if row and row[0] != "id"]
    return {row[0]: (float(row[1]), int(float(row[2]))) for row in rows}, json.loads(done.stdout)


# --- the comparison ------------------------------------------------------------------------------------------------


def best_of(what, runs):
    """The (setting, predictions) with the least log loss, told with all settings that were tried."""
    scored = [(judge(p, y)["logloss"], setting, p) for setting, p, y in runs]
    loss, setting, p = min(scored, key=lambda run: run[0])
    tried = ", ".join(f"{s:g}: {l:.4f}" for l, s, _ in scored)
    return p, f"{what} {setting:g} (of {tried})"


def compare(arguments):
    source = arguments.source
    shipped = source if source in ("kuairand", "obd") else "generated"
    config = pathlib.Path(arguments.config or ROOT / f"configs/{shipped}.toml").resolve()
    settings = tomllib.loads(config.read_text())
    files = event_files(source)
    window = seconds_of(arguments.window or settings.get("join", {}).get("window", "30m")) * 1000
    began = time.time()
    examples = join(records(files[0]), records(files[1]), window)
    data = Encoded(examples, settings["features"], settings.get("crosses", []))
    y = data.labels
    prior = settings["model"]["logistic"]["prior_ctr"]
    print(f"{source}: {len(data)} examples, {int(y.sum())} positive, {len(settings['features'])} features, "
          f"{len(data.interactions)} crosses, window {window / 3.6e6:g} h, read in {time.time() - began:.0f} s", flush=True)
    table = []

    def note(name, p, y, text, seconds):
        row = {"name": name, **judge(p, y), "seconds": round(seconds, 1), "settings": text}
        table.append(row)
        print(f"{name:34} logloss {row['logloss']:.5f}  AUC {row['auc']:.4f}  NE {row['ne']:.4f}  "
              f"calibration {row['calibration']:.3f}  {seconds:5.1f} s  {text}", flush=True)

    note("best constant", np.full(len(y), y.mean()), y, "", 0)
    truth = pathlib.Path(source) / "stats.json"
    if truth.is_file() and "best_logloss" in (stats := json.loads(truth.read_text())):
        print(f"{'the truth itself':34} logloss {stats['best_logloss']:.5f}  AUC {stats['best_auc']:.4f}")

    with tempfile.TemporaryDirectory() as scratch:
        text = pathlib.Path(scratch) / "examples.vw"
        text.write_text("\n".join(data.lines) + "\n")
        for crosses in [False, True] if data.interactions else [False]:
            suffix = " + crosses" if crosses else ""
            if "vw" in arguments.only:
                for name, (option, rates) in VW_RATES.items():
                    flags = ["--ftrl"] if "ftrl" in name else []
                    began = time.time()
                    runs = [(rate, vowpal_wabbit(data, text, [*flags, option, str(rate)], crosses, scratch), y) for rate in rates]
                    p, tried = best_of(option, runs)
                    note(name + suffix, p, y, tried, (time.time() - began) / len(rates))
            if "adagrad" in arguments.only:
                began = time.time()
                runs = [(rate, adagrad(data, rate, 1e-8, prior, crosses), y) for rate in ADAGRAD_RATES]
                p, tried = best_of("rate", runs)
                note("plain AdaGrad, per example" + suffix, p, y, tried, (time.time() - began) / len(ADAGRAD_RATES))
        if "summed" in arguments.only:
            crosses = bool(data.interactions)
            rate, n0 = KERNEL["a"], KERNEL["n0"]
            for batch in [1, *BATCHES]:
                began = time.time()
                p = (adagrad(data, rate, n0, prior, crosses) if batch == 1
                     else adagrad_summed(data, rate, n0, prior, crosses, batch))
                name = "our kernel, per example" if batch == 1 else f"our kernel, gradients of {batch} summed"
                note(name, p, y, f"a {rate} n0 {n0}, no default rows, hashed", time.time() - began)
        if "tidemill" in arguments.only:
            binary = find_binary(arguments.tidemill)
            if binary is None:
                print("tidemill: no binary in target/release or target/debug (cargo build --release), or name it with --tidemill")
            else:
                began = time.time()
                scores, report = tidemill(binary, config, files, scratch, arguments.set)
                seconds = time.time() - began
                labels = {str(record["id"]): label for record, label in examples}
                wrong = sum(labels.get(key) != label for key, (_, label) in scores.items())
                if set(scores) != set(labels) or wrong:
                    print(f"tidemill: {len(scores)} predictions, {len(set(scores) ^ set(labels))} ids differ, "
                          f"{wrong} labels differ from the {len(labels)} joined here")
                p, got = zip(*scores.values())
                note("tidemill", p, got, f"{binary} {' '.join(arguments.set)}".strip(), seconds)
                table[-1]["report"] = report
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps({"source": str(source), "examples": len(data), "table": table}, indent=1))
    return table


def target():
    """Where cargo builds to."""
    return pathlib.Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target").resolve()


def find_binary(named):
    if named:
        return pathlib.Path(named).resolve()
    return next((p for p in (target() / "release/tidemill", target() / "debug/tidemill") if p.is_file()), None)


def tested_binary():
    """What the tests run: what `cargo build` made, never an older release, or $TIDEMILL."""
    return pathlib.Path(os.environ.get("TIDEMILL") or target() / "debug/tidemill").resolve()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="kuairand, obd, or a directory of generated events")
    parser.add_argument("-c", "--config", help="TOML with the features; default configs/kuairand.toml, obd.toml or generated.toml")
    parser.add_argument("--window", help="instead of the config's join.window, such as 30m")
    parser.add_argument("--only", default="vw,adagrad,summed,tidemill", type=lambda s: s.split(","), help="some of vw,adagrad,summed,tidemill")
    parser.add_argument("--tidemill", help="path of the binary; default target/release, then target/debug")
    parser.add_argument("--set", action="append", default=[], help="a setting for tidemill train, key=value")
    parser.add_argument("--json", help="write the table to this file too")
    arguments = parser.parse_args()
    compare(arguments)


if __name__ == "__main__":
    main()
