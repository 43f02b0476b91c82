#!/usr/bin/env python3
"""Parquet as pyarrow writes and reads it: what others write gives the same weights as JSON lines, and what `tidemill examples` writes is what it says.

Runs the binary that `cargo build` made (or $TIDEMILL).
"""

import decimal
import json
import pathlib
import subprocess
import tempfile
import unittest

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import quality
import tidemill_encoding
import xxhash

ROOT = pathlib.Path(__file__).resolve().parent.parent
BINARY = quality.tested_binary()
SCRATCH = pathlib.Path(tempfile.mkdtemp(prefix="tidemill-parquet-"))


def tidemill(*args, code=0):
    done = subprocess.run([BINARY, *map(str, args)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, f"`tidemill {' '.join(map(str, args))}`: {done.returncode}\n{done.stderr}"
    return done.stdout if code == 0 else done.stderr


def settings(name, impressions, clicks):
    home = SCRATCH / name
    home.mkdir(exist_ok=True)
    places = {
        "impressions.source.paths": [str(impressions)],
        "clicks.source.paths": [str(clicks)],
        "checkpoint.dir": str(home / "checkpoints"),
        "snapshots.store": str(home / "snapshots"),
    }
    return ["-c", "configs/generated.toml", *(part for key, value in places.items() for part in ("--set", f"{key}={json.dumps(value)}"))]


def train(name, impressions, clicks):
    return json.loads(tidemill("train", "--until-end", "--json", *settings(name, impressions, clicks)))


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def dictionaries(column):
    """Strings as dictionaries, also inside of structs."""
    if pa.types.is_struct(column.type):
        members = [dictionaries(column.field(i)) for i in range(column.type.num_fields)]
        return pa.StructArray.from_arrays(members, names=[field.name for field in column.type])
    return column.dictionary_encode() if pa.types.is_string(column.type) else column


class Parquet(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.log = SCRATCH / "log"
        tidemill("generate", "--out", cls.log, "--impressions", 20_000, "--users", 2000, "--items", 300)
        cls.impressions, cls.clicks = cls.log / "impressions-000.jsonl", cls.log / "clicks-000.jsonl"
        cls.json = train("json", cls.impressions, cls.clicks)

    def write(self, name, change=lambda table: table, **options):
        paths = []
        for source in (self.impressions, self.clicks):
            path = SCRATCH / f"{name}-{source.stem}.parquet"
            pq.write_table(change(pa.Table.from_pylist(read(source))), path, **options)
            paths.append(path)
        return paths

    def test_files_by_pyarrow_give_the_weights_of_json_lines(self):
        def combined(change):
            return lambda table: pa.table({name: change(name, table[name].combine_chunks()) for name in table.column_names})

        layouts = {
            "default": {},
            "gzip": {"compression": "gzip", "data_page_version": "2.0", "row_group_size": 3000},
            "lz4": {"compression": "lz4", "use_dictionary": False, "write_page_checksum": True},
            "zstd": {"compression": "zstd", "change": combined(lambda _, column: dictionaries(column))},
            "times": {
                "compression": "none",
                "change": combined(lambda name, column: column.cast(pa.timestamp("ms", "Europe/Berlin")) if name == "ts" else column),
                "coerce_timestamps": "us",
            },
            "int96": {
                "change": combined(lambda name, column: column.cast(pa.timestamp("ms")) if name == "ts" else column),
                "use_deprecated_int96_timestamps": True,
            },
            "large": {
                "change": combined(lambda _, column: column.cast(pa.large_string()) if pa.types.is_string(column.type) else column),
            },
            "packed": {"column_encoding": {"id": "DELTA_BYTE_ARRAY", "ts": "DELTA_BINARY_PACKED"}, "use_dictionary": False},
        }
        for name, options in layouts.items():
            with self.subTest(name):
                found = train(name, *self.write(name, **options))
                self.assertEqual(self.json["model_digest"], found["model_digest"])
                self.assertEqual(self.json["counts"], found["counts"])

    def test_a_decimal_is_refused_by_name_and_brotli_too(self):
        def with_decimals(table):
            if "user" not in table.column_names:
                return table
            place = table.column_names.index("position")
            return table.set_column(place, "position", pa.array([decimal.Decimal(1)] * table.num_rows, pa.decimal128(9, 2)))

        said = tidemill("train", "--until-end", *settings("decimal", *self.write("decimal", with_decimals)), code=1)
        self.assertIn("column `position` is of type Decimal128(9, 2)", said)
        said = tidemill("train", "--until-end", *settings("brotli", *self.write("brotli", compression="brotli")), code=1)
        self.assertIn("is compressed by Brotli; known are none, Snappy", said)

    def test_examples_are_read_by_pyarrow(self):
        out = SCRATCH / "examples"
        told = json.loads(tidemill("examples", "--json", "--until-end", "--out", out, *settings("json", self.impressions, self.clicks)))
        files = sorted(out.glob("*.parquet"))
        self.assertEqual(told["files"], [str(path) for path in files])
        table = pa.concat_tables(pq.read_table(path) for path in files)
        self.assertEqual(table.num_rows, told["positives"] + told["negatives"])
        self.assertEqual(np.count_nonzero(table["label"].to_numpy()), told["positives"])
        times = table["time"].to_numpy()
        self.assertTrue((np.diff(times) >= np.timedelta64(0)).all())
        self.assertEqual(str(table.schema.field("time").type), "timestamp[ms, tz=UTC]")
        about = pq.read_metadata(files[0]).metadata
        schema = json.loads(about[b"tidemill.schema"])
        self.assertEqual(about[b"tidemill.schema_hash"].decode(), f"{xxhash.xxh3_64_intdigest(about[b'tidemill.schema']):016x}")
        # Values and rows belong together.
        log = {record["id"]: record for record in read(self.impressions)}
        first = {feature["name"]: index for index, feature in enumerate(schema["features"])}
        checked = 0
        for example in table.slice(0, 500).to_pylist():
            record = log[example["id"]]
            self.assertEqual(example["event_time"].timestamp(), record["ts"] / 1000)
            rows = dict(zip(example["slot_feature"], example["slot_row"]))
            for feature in schema["features"]:
                value = record
                for key in feature["from"].split("."):
                    value = (value or {}).get(key)
                told = example[feature["name"]]
                if feature["kind"] == "categorical" and value is not None:
                    self.assertEqual(told, str(value))
                    seed = tidemill_encoding.seed_of(feature["name"])
                    self.assertEqual(rows[first[feature["name"]]], tidemill_encoding.row_of(told.encode(), seed))
                    checked += 1
                elif feature["kind"] in ("multi", "sequence"):
                    self.assertEqual(told or [], value or [])
                else:
                    self.assertEqual(told, value)
        self.assertGreater(checked, 1000)
        again = json.loads(tidemill("train", "--until-end", "--json", "-c", out / "job.toml"))
        self.assertEqual(again["model_digest"], self.json["model_digest"])


if __name__ == "__main__":
    unittest.main()
