#!/usr/bin/env python3
"""Serves from a Tidemill snapshot without Tidemill: the worked example of docs/snapshot-format.md.

Needs numpy and safetensors for the weights, and xxhash for the digests and for the encoding of records, which is that
of docs/encoding.md, done by tidemill_encoding.py beside this file.

    python scripts/snapshot_reader.py STORE impressions.jsonl.gz > scores.csv

writes `id,logit,prediction` like `tidemill score`. Records that cannot be scored are reported on stderr, and the exit
code is 1. (Only id and features are looked at: a record that a trainer would reject for its time is scored.) In a
program:

    snapshot = Snapshot.load("snapshots/obd", "live")  # Refused says why it must not be served: go on with the old one
    logit, prediction = snapshot.score({"item_id": "men:2", ...})
"""

import argparse
import csv
import gzip
import json
import math
import pathlib
import re
import sys
import tomllib

import numpy as np
import safetensors
import safetensors.numpy
import xxhash
from tidemill_encoding import ENCODING, Mismatch, Schema, canonical_text, lookup, parse_path

TOLERANCE = 1e-5
PAYLOAD = {
    "logistic.ids": "uint64",
    "logistic.weights": "float32",
    "logistic.intercept": "float32",
    "logistic.default_rows": "uint64",
}
# In the order in which arrays stand in a file.
DTYPES = {
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
    "float32": "F32",
    "uint32": "U32",
    "int32": "I32",
    "float16": "F16",
    "uint8": "U8",
    "int8": "I8",
}


class Refused(Exception):
    """Why a version must not be served."""


def require(holds, key, reason):
    if not holds:
        raise Refused(f"`{key}` {reason}")


def read(store, key):
    try:
        return (pathlib.Path(store) / key).read_bytes()
    except FileNotFoundError:
        raise Refused(f"`{key}` is not in `{store}`; was it removed by retention?") from None


def read_sealed(store, key, format):
    """A JSON document whose last 45 bytes are `,"check":"<digest of all bytes before>"}` and a line end."""
    data = read(store, key)
    check = re.fullmatch(rb',"check":"([0-9a-f]{32})"\}\n', data[-45:])
    require(check, key, "does not end with its check; it was cut short or not written by tidemill")
    found = xxhash.xxh3_128_hexdigest(data[:-45])
    require(found == check[1].decode(), key, "does not have the digest that its check says; at least one byte differs")
    document = json.loads(data)
    require(document["format"] == format, key, f"has format `{document['format']}`, this reader knows `{format}`")
    return document


def current_version(store, channel):
    """The version that a channel says to serve: that of its highest entry. Files with other names are not entries."""
    folder = pathlib.Path(store) / "channels" / channel
    numbers = [int(path.stem) for path in folder.glob("*.json") if re.fullmatch("[0-9]{12}", path.stem)]
    require(numbers, f"channels/{channel}", f"has no entry in `{store}`")
    key = f"channels/{channel}/{max(numbers):012}.json"
    entry = read_sealed(store, key, "tidemill-channel/1")
    in_place = (entry["channel"], entry["number"]) == (channel, max(numbers))
    require(in_place, key, f"is entry {entry['number']} of `{entry['channel']}`: the file was moved")
    require(entry["version"] is not None, key, "names no version; nothing has been published yet")
    return entry["version"]


def read_manifest(store, version):
    """The manifest of a version, its key, and the digest of its bytes, by which a delta names it."""
    key = f"manifests/{version:012}.json"
    manifest = read_sealed(store, key, "tidemill-manifest/2")
    require(manifest["version"] == version, key, f"is of version {manifest['version']}: the file was moved")
    kind = manifest["kind"]
    require(kind in ("full", "delta"), key, f"is of kind `{kind}`, this reader knows `full` and `delta`")
    require((manifest["delta"] is not None) == (kind == "delta"), key, "must say what it changes if it is a delta")
    return key, manifest, xxhash.xxh3_128_hexdigest(read(store, key))


def read_chain(store, version):
    """Keys and manifests from a full to `version`, each the one that the delta behind it names."""
    key, manifest, _ = read_manifest(store, version)
    chain = [(key, manifest)]
    while (link := chain[-1][1]["delta"]) is not None:
        before_key, before, digest = read_manifest(store, link["after"])
        same = digest == link["after_digest"]
        require(same, chain[-1][0], f"changes a `{before_key}` with other bytes: an object was replaced")
        number, full = (before["delta"]["number"], before["delta"]["full"]) if before["delta"] else (0, link["after"])
        fits = (link["number"], link["full"]) == (number + 1, full)
        require(fits, chain[-1][0], f"is not the delta after `{before_key}`")
        chain.append((before_key, before))
    return chain[::-1]


def read_arrays(store, chain):
    """The arrays of a version: those of the full, changed by one delta after the other."""
    for key, manifest in chain:
        objects = manifest["objects"]
        require(len(objects) == 1, key, f"has {len(objects)} objects, a model has one")
        payload, length, digest = objects[0]["name"], objects[0]["length"], objects[0]["digest"]
        require(payload == f"objects/{digest}.safetensors", key, f"names `{payload}`, which does not fit its digest")
        if manifest["delta"] is None:
            arrays = read_payload(store, payload, length, digest, "snapshot/1")
        else:
            arrays = changed(arrays, read_payload(store, payload, length, digest, "delta/1"), payload)
    result = chain[-1][1]["delta"] and chain[-1][1]["delta"]["result"]
    if result:
        data = payload_bytes(arrays, "snapshot/1")
        found = (len(data), xxhash.xxh3_128_hexdigest(data))
        promised = (result["length"], result["digest"])
        require(found == promised, chain[-1][0], f"gives a payload of (length, digest) {found}, it says {promised}")
    return payload, arrays


def changed(arrays, delta, key):
    """Arrays after a delta: docs/snapshot-format.md, "Deltas"."""
    arrays = dict(arrays)
    for table, columns in ("logistic", ["weights"]), ("embedding", ["rows", "rows.scales"]):
        name = f"{table}.ids"
        require((name in arrays) == (name in delta), key, f"has `{name}`, or not, unlike what it changes")
        if name not in delta:
            continue
        ids, new, removed = arrays[name], delta.pop(name), delta.pop(f"{table}.removed")
        require(np.isin(removed, ids).all() and not np.isin(removed, new).any(), key, f"removes rows of `{name}` that are not there")
        keep = ~np.isin(ids, removed) & ~np.isin(ids, new)
        order = np.argsort(np.concatenate([ids[keep], new]), kind="stable")
        arrays[name] = np.concatenate([ids[keep], new])[order]
        for column in columns:
            column = f"{table}.{column}"
            require((column in arrays) == (column in delta), key, f"has `{column}`, or not, unlike what it changes")
            if column in delta:
                more = delta.pop(column)
                fits = (more.dtype, more.shape[1:]) == (arrays[column].dtype, arrays[column].shape[1:])
                require(fits and len(more) == len(new), key, f"has `{column}` as {more.dtype} {more.shape}")
                arrays[column] = np.concatenate([arrays[column][keep], more])[order]
    for name, array in delta.items():
        dense = name == "logistic.intercept" or name in arrays and name.startswith("towers.")
        require(dense, key, f"holds `{name}`, which no delta for this model has")
        fits = (array.dtype, array.shape) == (arrays[name].dtype, arrays[name].shape)
        require(fits, key, f"has `{name}` as {array.dtype} {array.shape}")
        arrays[name] = array
    return arrays


def payload_bytes(arrays, made_for):
    """The one file that holds these arrays: docs/snapshot-format.md, "Payload"."""
    names = sorted(arrays, key=lambda name: (list(DTYPES).index(str(arrays[name].dtype)), name))
    header, data = {"__metadata__": {"tidemill": made_for}}, b""
    for name in names:
        array = arrays[name]
        start, data = len(data), data + array.tobytes()
        dtype, shape = DTYPES[str(array.dtype)], list(array.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, len(data)]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def read_payload(store, key, length, digest, format):
    """The arrays of a payload by name, as numpy arrays."""
    data = read(store, key)
    require(len(data) == length, key, f"has {len(data)} bytes, the manifest says {length}")
    found = xxhash.xxh3_128_hexdigest(data)
    require(found == digest, key, f"has digest {found}, the manifest says {digest}: at least one byte differs")
    try:
        arrays = safetensors.numpy.load(data)
    except safetensors.SafetensorError as error:
        raise Refused(f"`{key}` is not a safetensors file: {error}") from error
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # has the metadata, which `load` leaves out
    made_for = header.get("__metadata__", {}).get("tidemill")
    require(made_for == format, key, f"was made for `{made_for}`, expected `{format}`")
    return arrays


class Towers:
    """The towers of a two-tower model, checked: docs/snapshot-format.md, "Towers"."""

    def __init__(self, arrays, default_rows, key):
        """Takes its arrays out of `arrays`."""
        take = lambda name, dtype, shape=None: self.take(arrays, key, name, dtype, shape)
        self.ids = take("embedding.ids", "uint64")
        rows = take("embedding.rows", ("float32", "float16", "int8"))
        self.rows = rows.astype(np.float32)
        if rows.dtype == np.int8:
            self.rows *= take("embedding.rows.scales", "float32", (len(rows),))[:, np.newaxis]
        require(self.rows.ndim == 2 and len(self.rows) == len(self.ids), key, "has other vectors than ids")
        require(np.all(self.ids[:-1] < self.ids[1:]) and 0 not in self.ids[:1], key, "has embedding ids out of order, or 0")
        dim = self.rows.shape[1]
        sides = take("towers.features", "uint8", (len(default_rows),))
        (activation,) = take("towers.activation", "uint8", (1,))
        require(activation in (0, 1), key, f"has the activation {activation}, this reader knows 0 and 1")
        self.activation = np.tanh if activation else lambda z: np.maximum(z, np.float32(0))
        shares = "towers.keys" in arrays
        self.keys = take("towers.keys", "uint64", sides.shape) if shares else np.zeros(len(sides), np.uint64)
        self.columns = {}  # feature -> (tower, first column, position of its default row)
        widths = {1: 0, 2: 0}
        for feature, side in enumerate(sides):
            if side == 0:
                continue
            require(side in widths, key, f"has a feature of tower {side}, this reader knows 1 and 2")
            default = self.find(self.vector(feature, default_rows[feature]))
            require(default is not None, key, f"has no default vector for feature {feature}")
            self.columns[feature] = (int(side), widths[side], default)
            widths[side] += dim
        self.widths = widths
        self.layers = {1: [], 2: []}
        for side, name in ((1, "user"), (2, "item")):
            inputs = widths[side]
            while (prefix := f"towers.{name}.{len(self.layers[side])}") + ".weight" in arrays:
                outputs = arrays[f"{prefix}.weight"].shape[-1]
                weight = take(f"{prefix}.weight", "float32", (inputs, outputs))
                bias = take(f"{prefix}.bias", "float32", (outputs,))
                norm = None
                if f"{prefix}.gain" in arrays:
                    norm = [take(f"{prefix}.{part}", "float32", (outputs,)) for part in ("gain", "shift")]
                self.layers[side].append((weight, bias, norm))
                inputs = outputs
        require(all(self.layers.values()), key, "has a tower without layers")
        self.scale = take("towers.scale", "float32", (1,))[0] if "towers.scale" in arrays else None

    @staticmethod
    def take(arrays, key, name, dtype, shape):
        require(name in arrays, key, f"has no `{name}`")
        array = arrays.pop(name)
        dtypes = (dtype,) if isinstance(dtype, str) else dtype
        fits = str(array.dtype) in dtypes and shape in (None, array.shape)
        require(fits, key, f"has `{name}` as {array.dtype} {array.shape}, expected {' or '.join(dtypes)} {shape or ''}")
        require(array.dtype.kind != "f" or np.isfinite(array).all(), key, f"has a number in `{name}` that is not finite")
        return array

    def find(self, row):
        at = int(np.searchsorted(self.ids, np.uint64(row)))
        return at if at < len(self.ids) and self.ids[at] == row else None

    def vector(self, feature, row):
        """The id of the vector of a row: features that share an embedding differ by their keys alone."""
        return int(row) ^ int(self.keys[feature]) or 1

    def product(self, slots):
        inputs = {side: np.zeros(width, np.float32) for side, width in self.widths.items()}
        for feature, row, value in (slot[:3] for slot in slots):
            if feature not in self.columns:
                continue
            side, column, default = self.columns[feature]
            own = self.find(self.vector(feature, row))
            vector = self.rows[default if own is None else own]
            inputs[side][column : column + len(vector)] += np.float32(value) * vector
        u, v = (self.says(self.layers[side], inputs[side]) for side in (1, 2))
        product = np.sum(u * v)
        if self.scale is None:
            return product
        length = lambda a: np.sqrt(np.sum(a * a) + np.float32(1e-4))
        return self.scale * product / (length(u) * length(v))

    def says(self, layers, x):
        for i, (weight, bias, norm) in enumerate(layers):
            x = x @ weight + bias
            if norm is not None:
                x = (x - x.mean()) / np.sqrt(x.var() + np.float32(1e-5)) * norm[0] + norm[1]
            if i + 1 < len(layers):
                x = self.activation(x)
        return x


class Snapshot:
    """One version, checked. Made by `load`."""

    @classmethod
    def load(cls, store, channel="live", version=None, schema_hash=None):
        """Loads `version`, or what `channel` names. Records encoded elsewhere fit only one schema: give its hash."""
        self = cls()
        version = current_version(store, channel) if version is None else version
        chain = read_chain(store, version)
        key, self.manifest = chain[-1]
        manifest = self.manifest
        model = manifest["model"]
        kinds = ("logistic", "two_tower")
        require(model["kind"] in kinds, key, f"has a `{model['kind']}` model, this reader knows {' and '.join(kinds)}")
        fits = schema_hash in (None, model["schema_hash"])
        require(fits, key, f"has schema {model['schema_hash']}, records are encoded by {schema_hash}")
        encoding = model["schema"]["encoding"]
        require(encoding == ENCODING, key, f"has encoding {encoding}, this reader knows {ENCODING}")
        self.schema = Schema(model["schema"])

        payload, arrays = read_arrays(store, chain)
        features = len(self.schema.features) + len(self.schema.crosses)
        self.towers = None
        if model["kind"] == "two_tower":
            require("logistic.default_rows" in arrays, payload, "has no `logistic.default_rows`")
            self.towers = Towers(arrays, arrays["logistic.default_rows"], payload)
        rounded = manifest["precision"] != "f32"
        types = {name: str(array.dtype) for name, array in arrays.items()}
        if rounded and types.get("logistic.weights") == "float16":
            arrays["logistic.weights"] = arrays["logistic.weights"].astype(np.float32)
            types["logistic.weights"] = "float32"
        require(types == PAYLOAD, payload, f"holds {types}, a logistic model is {PAYLOAD}")
        self.ids, self.weights, intercept, default_rows = (arrays[name] for name in PAYLOAD)
        shapes = [array.shape for array in (self.ids, self.weights, intercept, default_rows)]
        rows = manifest["rows"] - (len(self.towers.ids) if self.towers else 0)
        expected = [(rows,), (rows,), (1,), (features,)]
        require(shapes == expected, payload, f"has shapes {shapes}, expected {expected}")
        ascend = np.all(self.ids[:-1] < self.ids[1:]) and 0 not in self.ids[:1]
        require(ascend, payload, "has ids that are not strictly ascending, or 0")
        finite = np.isfinite(self.weights).all() and np.isfinite(intercept).all()
        require(finite, payload, "has weights that are not finite")
        same = default_rows.tolist() == [self.schema.default_row(i) for i in range(features)]
        require(same, payload, "has other default rows than its schema: this reader hashes differently")

        self.intercept = intercept[0]
        self.defaults = np.zeros(features, np.float32)
        own, known = self.find(default_rows)
        self.defaults[known] = own[known]
        for at, golden in enumerate(manifest["golden"]):
            slots = [(slot["feature"], int(slot["row"], 16), slot["value"]) for slot in golden["slots"]]
            within = all(feature < features for feature, _, _ in slots)
            require(within, key, f"golden vector {at} has a feature that is not in the schema")
            logit, expected = self.logit(slots), golden["logit"]
            close = abs(logit - expected) <= TOLERANCE * max(1, abs(expected))  # false for NaN
            require(close, key, f"golden vector {at} gives a logit of {logit}, expected {expected}")
        return self

    def find(self, rows):
        """Of each row: its weight, and whether it has one."""
        at = np.searchsorted(self.ids, rows)
        known = at < len(self.ids)
        known[known] = self.ids[at[known]] == rows[known]
        weights = np.zeros(len(rows), np.float32)
        weights[known] = self.weights[at[known]]
        return weights, known

    def logit(self, slots):
        """Logit (f32) of slots `(feature, row, value, ..)`. A row not in the table counts as its default row."""
        features, rows, values = zip(*(slot[:3] for slot in slots))
        own, known = self.find(np.array(rows, np.uint64))
        weights = np.where(known, own, self.defaults[list(features)])
        total = np.float32(0)
        for product in weights * np.array(values, np.float32):  # np.sum would add in another order
            total += product
        logit = total + self.intercept
        return logit + self.towers.product(slots) if self.towers else logit

    def score(self, record, element=None, as_logged=False):
        """Logit and probability of a record (a dict), or of one element of its exploded array."""
        logit = self.logit(self.schema.encode(record, element, at_serving=not as_logged))
        with np.errstate(over="ignore"):  # exp may be infinite: then it is 0
            return logit, 1 / (1 + np.exp(-np.float64(logit)))


def number_of(text):
    """Tidemill rejects a record with a number that is no finite double."""
    number = float(text)
    if not math.isfinite(number):
        raise Mismatch(f"{text} is not a finite number")
    return number


def scores_of(snapshot, line, settings, as_logged):
    """`(id, logit, prediction)` of each impression in a line; several if the config explodes an array of it."""
    record = json.loads(line, parse_float=number_of, parse_constant=number_of)
    if not isinstance(record, dict):
        raise Mismatch("is not an object")
    elements = lookup(record, parse_path(settings["explode"])[1]) if "explode" in settings else [None]
    if not isinstance(elements, list) or not elements:
        raise Mismatch(f"`{settings['explode']}` needs an array with elements")
    paths = settings.get("id", "id")
    scores = []
    for element in elements:
        parts = []
        for of_element, path in map(parse_path, [paths] if isinstance(paths, str) else paths):
            part = lookup(element if of_element else record, path)
            if part in (None, "") or isinstance(part, (dict, list)):
                raise Mismatch(f"has no id at `{'.'.join(path)}`")
            parts.append(canonical_text(part))
        scores.append(("\x1f".join(parts), *snapshot.score(record, element, as_logged)))
    return scores


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", help="snapshot store: a directory")
    parser.add_argument("file", help="JSON lines to score, plain or .gz")
    parser.add_argument("--channel", default="live", help="channel whose current version scores (default: live)")
    parser.add_argument("--version", type=int, metavar="N", help="score with this version instead")
    parser.add_argument("--as-logged", action="store_true", help="keep presentation features as they were logged")
    parser.add_argument("--config", help="configuration whose [impressions.record] says where ids are (default: `id`)")
    args = parser.parse_args()
    try:
        snapshot = Snapshot.load(args.store, args.channel, args.version)
    except Refused as error:
        sys.exit(f"refused: {error}")
    config = tomllib.loads(pathlib.Path(args.config).read_text()) if args.config else {}
    settings = config.get("impressions", {}).get("record", {})

    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(["id", "logit", "prediction"])
    shortest = lambda number: np.format_float_positional(number, trim="-")
    rejected = 0
    with (gzip.open if args.file.endswith(".gz") else open)(args.file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                scores = scores_of(snapshot, line, settings, args.as_logged)
            except (ValueError, OverflowError) as error:
                rejected += 1
                print(f"`{args.file}` line {number}: {error}", file=sys.stderr)
                continue
            out.writerows((id, shortest(logit), shortest(prediction)) for id, logit, prediction in scores)
    if rejected:
        sys.exit(f"{rejected} records could not be scored")


if __name__ == "__main__":
    main()
