#!/usr/bin/env python3
"""Tests of scripts/snapshot_reader.py: it gives the scores of `tidemill score`, and refuses what must not be served.

Trains by the binary that `cargo build` made (or $TIDEMILL), on Open Bandit and on slates with every kind of feature.
"""

import csv
import gzip
import io
import json
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
import urllib.request

import numpy as np
import quality
import safetensors.numpy
import xxhash
from bench_serve import Server
from snapshot_reader import Refused, Snapshot
from tidemill_encoding import ryu_text

ROOT = pathlib.Path(__file__).resolve().parent.parent
BINARY = quality.tested_binary()
IMPRESSIONS = ROOT / "tests/data/obd/impressions.jsonl.gz"
SCRATCH = pathlib.Path(tempfile.mkdtemp(prefix="tidemill-reader-"))
CHECK = 45

SLATES = """
[job]
name = "slates"
[impressions.source]
kind = "file"
paths = ["slates.jsonl"]
[impressions.record]
id = ["req", ".pos"]
explode = "items"
[clicks.source]
kind = "file"
paths = ["clicks.jsonl"]
[clicks.record]
id = ["req", "pos"]
[join]
window = "1h"
[checkpoint]
dir = "checkpoints"
[snapshots]
store = "snapshots"
[[features]]
name = "user"
[[features]]
name = "item"
from = ".id"
[[features]]
name = "position"
from = ".pos"
role = "presentation"
at_serving = 1
[[features]]
name = "price"
from = ".price"
kind = "numeric"
as = "value"
clip = [0, 1e6]
scale = 1e-5
log = true
[[features]]
name = "age"
kind = "numeric"
as = "bins"
bins = [18, 30.5, 65]
[[features]]
name = "rate"
kind = "numeric"
per_octave = 4
[[features]]
name = "tags"
from = ".tags"
kind = "multi"
max_len = 3
[[features]]
name = "history"
kind = "sequence"
max_len = 2
[[crosses]]
of = ["user", "item"]
[[crosses]]
of = ["tags", "history", "price"]
name = "größe"
max = 5
"""


def tidemill(*args, cwd=ROOT, code=0):
    done = subprocess.run([BINARY, *map(str, args)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == code, f"`tidemill {' '.join(map(str, args))}`: {done.returncode}\n{done.stderr}"
    return done.stdout


def reader(*args, code=0):
    command = [sys.executable, ROOT / "scripts/snapshot_reader.py", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, f"the reader with {args}: {done.returncode}\n{done.stderr}"
    return done.stdout, done.stderr


def train_obd(**more):
    home = SCRATCH / "obd"
    home.mkdir()
    places = {"checkpoint.dir": home / "checkpoints", "snapshots.store": home / "snapshots", **more}
    sets = [part for key, path in places.items() for part in ("--set", f"{key}={json.dumps(path if isinstance(path, int) else str(path))}")]
    tidemill("train", "-c", ROOT / "configs/obd.toml", "--until-end", *sets)
    return home / "snapshots"


VERSIONS = 5


def train_as_it_grows(home, config, impressions, clicks, period, settings):
    """VERSIONS versions, one for each `period` (ms) of a log that grows under the job, none before the last one is published.

    So which versions there are, and which rows each of them changes, depends on no clock and no disk. Of the periods behind
    the first the log gets one impression in ten: deltas are small beside the full that they follow.
    """
    log = home / "growing.jsonl"
    places = {
        "impressions.source.paths": [str(log)],
        "clicks.source.paths": [str(clicks)],
        "checkpoint.dir": str(home / "checkpoints"),
        "snapshots.store": str(home / "snapshots"),
        "publish.every": f"{period}ms",
        "publish.min_interval": "0s",
        "batch.period": f"{period // 20}ms",
        "impressions.source.poll": "10ms",
        "telemetry.listen": "127.0.0.1:0",
    }
    for stream in "impressions", "clicks":
        places |= {f"{stream}.max_out_of_order": f"{period // 20}ms", f"{stream}.max_ahead": f"{period // 20}ms"}
    sets = [part for key, value in (places | settings).items() for part in ("--set", f"{key}={json.dumps(value)}")]
    pieces = [[] for _ in range(VERSIONS)]
    with quality.open_text(impressions) as file:
        lines = file.readlines()
    first = json.loads(lines[0])["ts"] // period
    for line in lines:
        # Versions are due at multiples of the period. Half a period behind that, one is made for certain.
        piece = max((json.loads(line)["ts"] - period // 2) // period - first, 0)
        if piece < VERSIONS:
            pieces[piece].append(line)
    pieces[1:] = [piece[::10] for piece in pieces[1:]]
    log.touch()
    with Server([BINARY, "train", "-c", ROOT / config, *sets], home / "train.log") as job:
        url = job.wait_for(lambda: re.search("metrics at (http://.*/metrics)", job.log.read_text()))[1]
        metrics = lambda: urllib.request.urlopen(url).read().decode()
        for version, piece in enumerate(pieces, 1):
            with open(log, "a") as out:
                out.writelines(piece)
            job.wait_for(lambda: re.search(f"^tidemill_snapshot_version {version}$", metrics(), re.MULTILINE))
    made = sorted(int(path.stem) for path in (home / "snapshots/manifests").glob("*.json"))
    assert made == list(range(1, VERSIONS + 1)), made
    return home / "snapshots"


def grow_generated():
    """A stream with so many ids that a version changes few of them: chains are long."""
    home = SCRATCH / "generated"
    tidemill("generate", "--out", home, "-n", 60_000, "--rate", 100, "--window", "20s", "--delay-median", "5s")
    files = home / "impressions-000.jsonl", home / "clicks-000.jsonl"
    return train_as_it_grows(home, "configs/generated.toml", *files, 60_000, {"join.window": "20s"})


def grow_obd():
    home = SCRATCH / "obd-deltas"
    home.mkdir()
    settings = {"join.window": "1h", "snapshots.precision": "f16"}
    clicks = ROOT / "tests/data/obd/clicks.jsonl.gz"
    return train_as_it_grows(home, "configs/obd.toml", IMPRESSIONS, clicks, 24 * 3_600_000, settings)


def tower_settings(home, settings):
    """Writes the job of a two-tower model over the slates into its directory. Returns the settings laid over it."""
    home.mkdir()
    towers = {"user": "user", "item": "item", "price": "item", "age": "user", "rate": "user", "tags": "item", "history": "user"}
    config = SLATES.replace("slates.jsonl", "../slates/slates.jsonl").replace("clicks.jsonl", "../slates/clicks.jsonl")
    for feature, tower in towers.items():
        config = config.replace(f'name = "{feature}"\n', f'name = "{feature}"\ntower = "{tower}"\n')
    # A user's history is of items, and uses their vectors.
    config = config.replace('name = "history"\n', 'name = "history"\nembedding = "item"\n')
    (home / "towers.toml").write_text(config)
    settings = {"kind": "two_tower", "two_tower.dense.rate": 0.01, "two_tower.dense.warm_up": 0, **settings}
    return {"batch.examples": 64, **{f"model.{key}": value for key, value in settings.items()}}


def train_towers(name, **settings):
    home = SCRATCH / name
    settings = tower_settings(home, settings) | {"snapshots.deltas": 0}
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    tidemill("train", "-c", "towers.toml", "--until-end", *sets, cwd=home)
    return home / "snapshots"


def grow_towers(precision, **settings):
    home = SCRATCH / f"towers-{precision}"
    settings = tower_settings(home, settings) | {"join.window": "1s", "snapshots.precision": precision}
    files = SCRATCH / "slates/slates.jsonl", SCRATCH / "slates/clicks.jsonl"
    return train_as_it_grows(home, home / "towers.toml", *files, 100_000, settings)


def train_slates():
    """Slates with ids of two fields, missing values, texts that CSV and JSON escape, and all kinds of features."""
    home = SCRATCH / "slates"
    home.mkdir()
    (home / "slates.toml").write_text(SLATES)
    chance = random.Random(3)
    names = ['a"b', "x,y", "Zürich", "\U0001f30a", "line\nend", 7, 7.5, True, None, 1e20, -1e-7]
    slates, clicks = [], []
    for i in range(800):
        time, req = 1_700_000_000_000 + i * 1000, f"r{i}" if i % 3 else i
        history = [chance.choice(names) for _ in range(chance.randrange(4))]
        items = []
        for pos in range(3):
            tags = chance.choice([None, [], "one", ["a", None, 5, 5.0], {"12": 3, "7": 0, "40": -1.5, "41": 1e7}])
            price = chance.choice([None, 0, 3, -9, 49.9, 1e12, True])
            items.append({"id": chance.choice(names), "pos": pos, "price": price, "tags": tags})
            if chance.random() < 0.3:
                clicks.append({"req": req, "pos": pos, "ts": time + 500})
        user = {"user": chance.choice(names), "age": chance.choice([5, 18, 30.5, 70, None]), "rate": chance.gauss(0, 4)}
        slates.append({"req": req, "ts": time, **user, "history": history, "items": items})
    write = lambda name, records: (home / name).write_text("".join(json.dumps(r) + "\n" for r in records))
    write("slates.jsonl", slates)
    write("clicks.jsonl", clicks)
    tidemill("train", "-c", "slates.toml", "--until-end", "--set", "snapshots.deltas=0", cwd=home)
    return home / "snapshots"


class Store:
    """A copy of a trained store, to be spoiled."""

    def __init__(self, original):
        self.dir = pathlib.Path(tempfile.mkdtemp(dir=SCRATCH)) / "store"
        shutil.copytree(original, self.dir)
        self.entry = max((self.dir / "channels/live").glob("*.json"))
        self.manifest = max((self.dir / "manifests").glob("*.json"))
        self.payload = self.dir / json.loads(self.manifest.read_text())["objects"][0]["name"]

    def load(self):
        return Snapshot.load(self.dir)

    def reseal(self, path, change):
        """Changes a document as somebody would who keeps to the format."""
        document = json.loads(path.read_bytes()[:-CHECK] + b"}")
        change(document)
        body = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()[:-1]
        path.write_bytes(body + b',"check":"' + xxhash.xxh3_128_hexdigest(body).encode() + b'"}\n')

    def republish(self, change, metadata="snapshot/1"):
        """Changes the arrays; length, digest and name are right again."""
        arrays = {name: array.copy() for name, array in safetensors.numpy.load_file(self.payload).items()}
        change(arrays)
        data = safetensors.numpy.save(arrays, {"tidemill": metadata})
        digest = xxhash.xxh3_128_hexdigest(data)
        name = f"objects/{digest}.safetensors"
        (self.dir / name).write_bytes(data)
        objects = [{"name": name, "length": len(data), "digest": digest}]
        self.reseal(self.manifest, lambda manifest: manifest.update(objects=objects))


class Reader(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.obd = train_obd(**{"snapshots.deltas": 0})
        cls.slates = train_slates()
        plain = {"two_tower.dim": 8, "two_tower.layers": [16, 8]}
        full = {**plain, "two_tower.layer_norm": True, "two_tower.normalize": True, "two_tower.activation": "tanh"}
        cls.towers = [train_towers("towers", **plain), train_towers("all-on", **full)]
        cls.towers.append(train_towers("narrow", **{"two_tower.wide": False}))
        # Several versions, in chains of deltas, at each precision.
        cls.long = grow_generated()
        cls.chains = [grow_obd(), *(grow_towers(precision, **plain) for precision in ("f32", "f16", "int8"))]

    def compare(self, what, ours, theirs, records, logit_tolerance=0):
        """Predictions must agree within 1e-6; the logits of equal slots to the last bit."""
        (head, *ours), (their_head, *theirs) = csv.reader(io.StringIO(ours)), csv.reader(io.StringIO(theirs))
        self.assertEqual((head, len(ours)), (their_head, records))
        self.assertEqual([row[0] for row in ours], [row[0] for row in theirs])
        our, their = (np.array([(np.float32(row[1]), row[2]) for row in rows], np.float64) for rows in (ours, theirs))
        logits, predictions = np.abs(our - their).max(axis=0)
        print(f"{what}: {len(ours)} records, max |difference| of predictions {predictions:.3g}, of logits {logits:.3g}")
        self.assertLessEqual(predictions, 1e-6)
        self.assertLessEqual(logits, logit_tolerance)
        self.assertGreater(np.ptp(our[:, 1]), 1e-5, "predictions that are all alike compare nothing")
        return our

    def test_the_scores_of_open_bandit_are_those_of_tidemill_score(self):
        made = []
        for flags in [], ["--as-logged"]:
            theirs = tidemill("score", "--store", self.obd, IMPRESSIONS, *flags)
            what = f"open bandit, {'as logged' if flags else 'at serving'}"
            made.append(self.compare(what, reader(self.obd, IMPRESSIONS, *flags)[0], theirs, 40_000))
        self.assertGreater(np.abs(made[0] - made[1]).max(), 1e-3, "position and policy must matter")

    def test_the_scores_of_slates_are_those_of_tidemill_score_and_the_same_lines_are_rejected(self):
        home = self.slates.parent
        item = '{"id": 1, "pos": 1}'
        bad = [
            "{",
            "[]",
            '{"req": "no slate", "ts": 1700000000000}',
            '{"req": "empty", "ts": 1700000000000, "items": []}',
            '{"ts": 1700000000000, "items": [%s]}' % item,
            '{"req": "number", "ts": 1700000000000, "age": "old", "items": [%s]}' % item,
            '{"req": "half", "ts": 1700000000000, "items": [%s, {"id": [1], "pos": 2}]}' % item,
            '{"req": "infinite", "ts": 1700000000000, "age": 1e999, "items": [%s]}' % item,
        ]
        lines = (home / "slates.jsonl").read_text().splitlines()
        (home / "some_bad.jsonl").write_text("\n".join([*lines[:100], *bad, "", *lines[100:]]) + "\n")
        for flags in [], ["--as-logged"]:
            args = [home / "some_bad.jsonl", "--config", home / "slates.toml", *flags]
            theirs = tidemill("score", "--store", self.slates, *args, code=1)
            ours, errors = reader(self.slates, *args, code=1)
            # The schema takes logarithms, which may differ in the last bit.
            self.compare(f"slates, {'as logged' if flags else 'at serving'}", ours, theirs, 2400, 1e-5)
            numbers = [int(line) for line in re.findall("line ([0-9]+):", errors)]
            self.assertEqual(numbers, list(range(101, 101 + len(bad))), errors)

    def test_the_scores_of_two_towers_are_those_of_tidemill_score(self):
        for store in self.towers:
            args = [SCRATCH / "slates/slates.jsonl", "--config", store.parent / "towers.toml"]
            theirs = tidemill("score", "--store", store, *args)
            self.compare(store.parent.name, reader(store, *args)[0], theirs, 2400, 1e-5)
            products = [json.loads(line)["towers"] for line in tidemill("score", "--store", store, "--explain", *args).splitlines()]
            self.assertGreater(np.std(products), 1e-3, "the towers must say something")

    def test_towers_that_are_no_servable_model_are_refused(self):
        def replace(name, make):
            return lambda arrays: arrays.update({name: make(arrays[name])})

        cases = [
            (lambda arrays: arrays.pop("towers.user.1.bias"), "has no `towers.user.1.bias`"),
            (lambda arrays: arrays.pop("towers.activation"), "has no `towers.activation`"),
            (replace("embedding.ids", lambda ids: ids[::-1].copy()), "out of order"),
            (replace("embedding.rows", lambda rows: rows * np.float32(np.nan)), "finite"),
            (replace("embedding.rows", lambda rows: rows[1:]), "other vectors"),
            (replace("towers.features", lambda features: features + np.uint8(2)), "tower 3|tower 4|no default"),
            (replace("towers.item.0.weight", lambda weight: weight[1:]), "towers.item.0.weight"),
            (replace("towers.item.1.weight", lambda weight: weight + np.float32(0.1)), "golden vector"),
            (lambda arrays: arrays.update(extra=np.zeros(1)), "extra"),
        ]
        for change, reason in cases:
            store = Store(self.towers[0])
            store.load()
            store.republish(change)
            with self.assertRaisesRegex(Refused, reason):
                store.load()

    def test_every_golden_vector_is_reproduced(self):
        for store in self.obd, self.slates, *self.towers:
            snapshot = Snapshot.load(store)
            worst, golden = 0, snapshot.manifest["golden"]
            for example in golden:
                slots = [(s["feature"], int(s["row"], 16), s["value"]) for s in example["slots"]]
                worst = max(worst, abs(snapshot.logit(slots) - np.float32(example["logit"])))
            print(f"{store.parent.name}: {len(golden)} golden vectors, max |difference| of logits {worst:.3g}")
            self.assertGreater(len(golden), 1)
            self.assertLessEqual(worst, 1e-5)

    def test_a_chain_of_deltas_gives_the_scores_of_tidemill_score_at_every_precision(self):
        for store in self.chains:
            versions = sorted(int(path.stem) for path in (store / "manifests").glob("*.json"))
            manifests = [json.loads((store / f"manifests/{version:012}.json").read_text()) for version in versions]
            deltas = [manifest for manifest in manifests if manifest["delta"]]
            self.assertGreater(len(deltas), 0, store)
            deep = max(deltas, key=lambda manifest: (manifest["delta"]["number"], manifest["version"]))
            if "obd" in store.parent.name:
                args, records = [IMPRESSIONS], 40_000
            else:
                args, records = [SCRATCH / "slates/slates.jsonl", "--config", store.parent / "towers.toml"], 2400
            theirs = tidemill("score", "--store", store, *args, "--version-number", deep["version"])
            ours = reader(store, *args, "--version", deep["version"])[0]
            self.compare(f"{store.parent.name}, delta {deep['delta']['number']}", ours, theirs, records, 1e-5)
            print(f"{store.parent.name}: {deep['objects'][0]['length']} bytes, a full {deep['delta']['result']['length']}")
            self.assertEqual(deep["rounding"] > 0, deep["precision"] != "f32")

    def test_a_chain_with_a_missing_a_foreign_or_a_forged_link_is_refused(self):
        original = self.long
        versions = sorted(int(path.stem) for path in (original / "manifests").glob("*.json"))
        path = lambda store, version: store.dir / f"manifests/{version:012}.json"
        link = lambda version: json.loads(path(Store(original), version).read_text())["delta"]
        deep = max((version for version in versions if link(version)), key=lambda version: link(version)["number"])
        after = link(deep)["after"]
        self.assertGreater(link(deep)["number"], 1)
        cases = [
            (lambda store: path(store, after).unlink(), "is not in"),
            (lambda store: store.reseal(path(store, after), lambda m: m.update(writer="another")), "other bytes"),
            (lambda store: store.reseal(path(store, deep), lambda m: m["delta"].update(number=1)), "not the delta after"),
            (lambda store: store.reseal(path(store, deep), lambda m: m["delta"]["result"].update(length=1)), "gives a payload"),
            (lambda store: store.reseal(path(store, deep), lambda m: m.update(delta=None)), "if it is a delta"),
            (lambda store: store.reseal(path(store, deep), lambda m: m.update(kind="full", delta=None)), "delta/1"),
        ]
        for change, reason in cases:
            store = Store(original)
            Snapshot.load(store.dir, version=deep)
            change(store)
            with self.assertRaisesRegex(Refused, reason):
                Snapshot.load(store.dir, version=deep)

    def test_a_version_may_be_asked_for_and_other_files_are_no_entries(self):
        store = Store(self.obd)
        newest = int(store.manifest.stem)
        self.assertEqual(Snapshot.load(store.dir).manifest["version"], newest)
        self.assertEqual(Snapshot.load(store.dir, version=1).manifest["version"], 1)
        args = [IMPRESSIONS, "--version"]
        theirs = tidemill("score", "--store", store.dir, IMPRESSIONS, "--version-number", 1)
        self.compare("open bandit, version 1", reader(store.dir, *args, 1)[0], theirs, 40_000)
        for other in "000000000099.json#1", "notes.json", "99.json":
            (store.entry.parent / other).write_text("{")
        self.assertEqual(store.load().manifest["version"], newest)
        _, errors = reader(store.dir, *args, 77, code=1)
        self.assertIn("refused: `manifests/000000000077.json` is not in", errors)
        self.assertRaisesRegex(Refused, "channels/test", Snapshot.load, store.dir, "test")

    def test_the_schema_hash_is_that_of_its_canonical_text(self):
        order = "name from kind tower role at_serving clip scale as per_octave bins log max_len of max".split()
        cross_order = "of name max".split()

        def text(v):
            if isinstance(v, float):
                return ryu_text(v)
            if isinstance(v, list):
                return f"[{','.join(map(text, v))}]"
            if isinstance(v, dict):
                keys = cross_order if "of" in v else order if "name" in v else ["encoding", "features", "crosses"]
                assert set(v) <= set(keys), v
                return "{" + ",".join(f'"{key}":{text(v[key])}' for key in keys if key in v) + "}"
            return json.dumps(v, ensure_ascii=False)

        for store in self.obd, self.slates:
            model = Snapshot.load(store).manifest["model"]
            self.assertEqual(xxhash.xxh3_64_hexdigest(text(model["schema"]).encode()), model["schema_hash"])
            Snapshot.load(store, schema_hash=model["schema_hash"])
            self.assertRaisesRegex(Refused, "records are encoded by", Snapshot.load, store, schema_hash="0" * 16)

    def test_a_flipped_byte_anywhere_is_refused(self):
        store = Store(self.obd)
        for path in store.payload, store.manifest, store.entry:
            good = path.read_bytes()
            places = [0, len(good) - CHECK, len(good) - 1, *random.Random(1).choices(range(len(good)), k=50)]
            for at in places:
                path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
                with self.assertRaises(Refused, msg=f"{path.name}, byte {at}") as refused:
                    store.load()
                self.assertIn(path.name, str(refused.exception))
            path.write_bytes(good)
            store.load()

    def test_a_truncated_file_is_refused(self):
        store = Store(self.obd)
        for path in store.payload, store.manifest, store.entry:
            good = path.read_bytes()
            for length in 0, 7, len(good) // 2, len(good) - 1:
                path.write_bytes(good[:length])
                with self.assertRaises(Refused, msg=f"{path.name}, {length} bytes") as refused:
                    store.load()
                self.assertIn(path.name, str(refused.exception))
            path.write_bytes(good)
        store.payload.unlink()
        self.assertRaisesRegex(Refused, "is not in", store.load)

    def test_a_well_formed_payload_that_is_no_servable_model_is_refused(self):
        def put(name, at, value):
            return lambda arrays: arrays[f"logistic.{name}"].__setitem__(at, value)

        def replace(name, make):
            return lambda arrays: arrays.update({f"logistic.{name}": make(arrays[f"logistic.{name}"])})

        cases = [
            (put("ids", 0, 0), "ids"),
            (replace("ids", lambda ids: ids[::-1].copy()), "strictly ascending"),
            (replace("ids", lambda ids: np.repeat(ids[::2], 2)[: len(ids)]), "strictly ascending"),
            (replace("ids", lambda ids: ids.astype(np.int64)), "int64"),
            (replace("ids", lambda ids: ids[1:]), "shapes"),
            (replace("weights", lambda weights: weights.reshape(-1, 1)), "shapes"),
            (replace("weights", lambda weights: weights.astype(np.float64)), "float64"),
            (put("weights", 5, np.nan), "finite"),
            (put("intercept", 0, np.inf), "finite"),
            (put("default_rows", 0, 5), "default rows"),
            (lambda arrays: arrays.update(extra=np.zeros(1)), "extra"),
            (lambda arrays: arrays.pop("logistic.weights"), "holds"),
            (replace("weights", lambda weights: weights + np.float32(1e-3)), "golden vector 0"),
        ]
        for change, reason in cases:
            store = Store(self.obd)
            store.republish(change)
            with self.assertRaisesRegex(Refused, reason):
                store.load()
        store = Store(self.obd)
        store.republish(lambda arrays: None, "checkpoint/1")
        self.assertRaisesRegex(Refused, "checkpoint/1", store.load)
        store.republish(lambda arrays: None)
        store.load()

    def test_a_well_formed_document_that_says_something_else_is_refused(self):
        def model(**members):
            return lambda manifest: manifest["model"].update(members)

        manifests = [
            (lambda m: m.update(format="tidemill-manifest/3"), "tidemill-manifest/3"),
            (lambda m: m.update(version=1000), "moved"),
            (lambda m: m.update(kind="delta"), "if it is a delta"),
            (lambda m: m.update(kind="other"), "kind `other`"),
            (lambda m: m.update(rows=m["rows"] + 1), "shapes"),
            (lambda m: m.update(objects=m["objects"] * 2), "2 objects"),
            (lambda m: m["objects"][0].update(name="objects/other.safetensors"), "does not fit its digest"),
            (lambda m: m["objects"][0].update(length=1), "the manifest says 1"),
            (lambda m: m["golden"][1].update(logit=m["golden"][1]["logit"] + 1e-3), "golden vector 1"),
            (lambda m: m["golden"][1]["slots"][0].update(feature=1000), "not in the schema"),
            (model(kind="fm"), "`fm` model"),
            (model(kind="two_tower"), "has no `embedding.ids`"),
            (lambda m: m["model"]["schema"].update(encoding=1), "encoding 1"),
            (lambda m: m["model"]["schema"]["features"][0].update(name="other"), "default rows"),
        ]
        entries = [
            (lambda e: e.update(format="tidemill-channel/2"), "tidemill-channel/2"),
            (lambda e: e.update(number=1000), "moved"),
            (lambda e: e.update(channel="test"), "moved"),
            (lambda e: e.update(version=None), "nothing has been published"),
            (lambda e: e.update(version=1000), "retention"),
        ]
        for name, cases in ("manifest", manifests), ("entry", entries):
            for change, reason in cases:
                store = Store(self.obd)
                store.reseal(getattr(store, name), lambda document: None)
                store.load()
                store.reseal(getattr(store, name), change)
                with self.assertRaisesRegex(Refused, reason):
                    store.load()

    def test_the_example_in_the_document_runs(self):
        page = (ROOT / "docs/snapshot-format.md").read_text()
        [example] = re.findall("```python\n(.*?)```", page, re.S)
        for store in self.obd, self.slates:
            code = example + "assert len(manifest['golden']) > 1\n"
            done = subprocess.run([sys.executable, "-c", code], cwd=store.parent, capture_output=True, text=True)
            self.assertEqual(done.returncode, 0, done.stderr)


if __name__ == "__main__":
    try:
        result = unittest.main(exit=False, verbosity=2).result
    finally:
        shutil.rmtree(SCRATCH)
    failed = len(result.failures) + len(result.errors)
    sys.stderr.flush()
    print(f"{result.testsRun - failed} passed, {failed} failed")
    sys.exit(failed > 0)
