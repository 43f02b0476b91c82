#!/usr/bin/env python3
"""The feature encoding of docs/encoding.md in plain Python (needs only the `xxhash` package).

A snapshot's manifest carries its schema; `Schema.from_json(text).encode(record)` gives the slots that the trainer made
of the same record, so that scores can be reproduced without Rust.

    python scripts/tidemill_encoding.py --self-test    # checks the vectors of docs/encoding.md
    python scripts/tidemill_encoding.py schema.json < records.jsonl
"""

import argparse
import json
import math
import pathlib
import re
import struct
import sys
from typing import Any, NamedTuple

import xxhash

ENCODING = 2
MARK_BITS = 12
BOUND = 1e6
LEAST_WEIGHT = 1e-6


class Slot(NamedTuple):
    """One value of one feature: `feature` indexes features, then crosses; `value` is exactly a 32-bit float."""

    feature: int
    row: int
    value: float
    missing: bool


class Mismatch(ValueError):
    """A value that its feature cannot take; the trainer rejects the record."""


# --- texts and hashes -----------------------------------------------------------------------------------------------


def ryu_text(v: float) -> str:
    """The shortest digits that read back as `v`, as the Rust crate `ryu` writes them.

    `repr` gives the same digits; only the layout differs. With the digits d1 d2 .. dn and the value 0.d1d2..dn * 10^p:
    p > 16 or p < -4: scientific, `1.2e34`, no sign or zeros in front of the exponent; otherwise plain, with `.0` after
    a whole number.
    """
    if v == 0:
        return "-0.0" if math.copysign(1, v) < 0 else "0.0"
    mantissa, _, exponent = repr(abs(v)).partition("e")
    whole, _, fraction = mantissa.partition(".")
    point = len(whole) + int(exponent or 0)
    digits = whole + fraction
    point -= len(digits) - len(digits.lstrip("0"))
    digits = digits.strip("0")
    sign = "-" if v < 0 else ""
    if not -5 < point <= 16:
        tail = "." + digits[1:] if len(digits) > 1 else ""
        return f"{sign}{digits[0]}{tail}e{point - 1}"
    if point <= 0:
        return f"{sign}0.{'0' * -point}{digits}"
    if point >= len(digits):
        return f"{sign}{digits}{'0' * (point - len(digits))}.0"
    return f"{sign}{digits[:point]}.{digits[point:]}"


def canonical_text(v: Any) -> str:
    """The text that is hashed for a JSON string, number or boolean."""
    if isinstance(v, bool):
        return "true" if v else "false"
    if isinstance(v, str):
        return v
    if isinstance(v, int):
        if -(2**63) <= v < 2**64:
            return str(v)
        v = float(v)
    if isinstance(v, float):
        return str(int(v)) if v == math.trunc(v) and abs(v) < 2**53 else ryu_text(v)
    raise Mismatch(f"{v!r} has no canonical text")


def seed_of(name: str) -> int:
    return xxhash.xxh3_64_intdigest(name.encode())


def mark_of(high: int, seed: int) -> int:
    """The low bits of a row whose other bits are `high`."""
    return ((high ^ seed) * 0x9E3779B97F4A7C15 & 2**64 - 1) >> 64 - MARK_BITS


def row_of(text: bytes, seed: int) -> int:
    high = xxhash.xxh3_64_intdigest(text, seed) >> MARK_BITS
    return high << MARK_BITS | mark_of(high, seed) or 1


def may_be_of(row: int, seed: int) -> bool:
    """Whether a row may be one of the feature with this seed: true of its own, and of one in 4096 others."""
    return row & 2**MARK_BITS - 1 == mark_of(row >> MARK_BITS, seed)


def id_of(*parts: Any) -> int:
    """The hash of an impression id; several parts are joined by 0x1F."""
    return xxhash.xxh3_64_intdigest("\x1f".join(map(canonical_text, parts)).encode()) or 1


def f32(v: float) -> float:
    return struct.unpack("<f", struct.pack("<f", v))[0]


def bounded(v: float) -> float:
    return max(-BOUND, min(BOUND, v))


def steps(x: float, shift: int) -> int:
    """Exponent and first `shift` mantissa bits of a positive double, read as one integer."""
    return struct.unpack("<Q", struct.pack("<d", x))[0] >> (52 - shift)


def bucket(x: float, per_octave: int) -> int:
    if abs(x) < 1 / 1024:
        return 0
    shift = per_octave.bit_length() - 1
    k = 1 + steps(abs(x), shift) - steps(1 / 1024, shift)
    return -k if x < 0 else k


# --- schema ---------------------------------------------------------------------------------------------------------


def parse_path(text: str) -> tuple[bool, list[str]]:
    of_element = text.startswith(".")
    body = text[1:] if of_element else text
    if not body:
        return of_element, []
    parts = [""]
    chars = iter(body)
    for c in chars:
        if c == ".":
            parts.append("")
        else:
            parts[-1] += next(chars) if c == "\\" else c
    return of_element, parts


def lookup(value: Any, parts: list[str]) -> Any:
    """The value at a path; None where it is missing or null."""
    for part in parts:
        if value is None:
            return None
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and re.fullmatch("0|[1-9][0-9]*", part):
            value = value[int(part)] if int(part) < len(value) else None
        else:
            raise Mismatch(f"paths go on inside of {value!r}")
    return value


class Feature:
    def __init__(self, index: int, settings: dict):
        self.index = index
        self.name = settings["name"]
        self.kind = settings.get("kind", "categorical")
        self.of_element, self.path = parse_path(settings.get("from", self.name))
        self.presentation = settings.get("role") == "presentation"
        self.at_serving = settings.get("at_serving")
        self.clip = settings.get("clip")
        self.scale = settings.get("scale", 1.0)
        self.form = settings.get("as", "bucket")
        self.per_octave = settings.get("per_octave", 1)
        self.bins = settings.get("bins", [])
        self.log = settings.get("log", False)
        self.max_len = settings.get("max_len", 64)
        embedding = settings.get("embedding")
        self.seed = seed_of(embedding or self.name)
        self.key = seed_of(self.name) if embedding else 0

    def row(self, text: bytes) -> int:
        return row_of(text, self.seed) ^ self.key or 1

    def slot(self, text: str, value: float = 1.0) -> Slot:
        return Slot(self.index, self.row(text.encode()), value, False)

    def missing(self) -> Slot:
        return Slot(self.index, self.row(b"\xff"), 1.0, True)

    def encode(self, v: Any) -> list[Slot]:
        if self.kind in ("multi", "sequence"):
            return self.bag(v)
        if v is None:
            return [self.missing()]
        if isinstance(v, (dict, list)):
            raise Mismatch(f"feature `{self.name}` takes no array or object")
        return [self.slot(canonical_text(v)) if self.kind == "categorical" else self.number(v)]

    def number(self, v: Any) -> Slot:
        if isinstance(v, str):
            raise Mismatch(f"feature `{self.name}` needs a number or boolean")
        x = float(v)
        if self.clip:
            x = max(self.clip[0], min(self.clip[1], x))
        x *= self.scale
        x = max(-sys.float_info.max, min(sys.float_info.max, x))
        if self.form == "bucket":
            return self.slot(f"b{bucket(x, self.per_octave)}")
        if self.form == "bins":
            return self.slot(f"n{sum(edge <= x for edge in self.bins)}")
        if self.log:
            x = math.copysign(math.log1p(abs(x)), x)
        return self.slot("v", f32(bounded(x)))

    def bag(self, v: Any) -> list[Slot]:
        if isinstance(v, dict):
            if self.kind == "sequence":
                raise Mismatch(f"feature `{self.name}`: a sequence takes an array")
            if any(isinstance(w, (str, list, dict)) for w in v.values()):
                raise Mismatch(f"feature `{self.name}`: weights are numbers")
            weights = [(key, float(w)) for key, w in v.items() if w is not None]
            values = [(key, bounded(w)) for key, w in weights if abs(w) >= LEAST_WEIGHT]
        else:
            items = v if isinstance(v, list) else [v]
            values = [(canonical_text(item), 1.0) for item in items if item is not None]
        values = values[-self.max_len :] if self.kind == "sequence" else values[: self.max_len]
        if not values:
            return [self.missing()]
        total = 0.0
        for _, w in values:  # in order: `sum` of newer Pythons compensates, which rounds otherwise
            total += w * w
        norm = math.sqrt(total)
        return [self.slot(text, f32(w / norm)) for text, w in values]


class Schema:
    """The `schema` of a manifest."""

    def __init__(self, spec: dict):
        if spec["encoding"] != ENCODING:
            raise ValueError(f"encoding {spec['encoding']}, this reader knows {ENCODING}")
        self.features = [Feature(i, settings) for i, settings in enumerate(spec["features"])]
        index = {feature.name: i for i, feature in enumerate(self.features)}
        self.crosses = []
        for cross in spec["crosses"]:
            name = cross.get("name", "*".join(cross["of"]))
            self.crosses.append((name, [index[part] for part in cross["of"]], cross.get("max", 64)))

    @classmethod
    def from_json(cls, text: str) -> "Schema":
        return cls(json.loads(text))

    def name(self, i: int) -> str:
        return self.features[i].name if i < len(self.features) else self.crosses[i - len(self.features)][0]

    def default_row(self, i: int) -> int:
        """The row that an id without a row of its own contributes."""
        return self.features[i].row(b"\xfe") if i < len(self.features) else row_of(b"\xfe", seed_of(self.name(i)))

    def vector(self, i: int, row: int) -> int:
        """The id of the vector that a row of a feature has in the towers."""
        return row ^ self.features[i].key or 1

    def may_own(self, i: int, row: int) -> bool:
        """Whether a row may be one of feature or cross `i`: true of its own, and of one in 4096 others."""
        if i < len(self.features):
            return may_be_of(row ^ self.features[i].key, self.features[i].seed)
        return may_be_of(row, seed_of(self.name(i)))

    def encode(self, record: dict, element: Any = None, at_serving: bool = False) -> list[Slot]:
        """The slots of a record, or of one element of its exploded array."""
        groups = []
        for feature in self.features:
            if at_serving and feature.presentation:
                value = feature.at_serving
            else:
                value = lookup(element if feature.of_element else record, feature.path)
            groups.append(feature.encode(value))
        for i, (name, parts, limit) in enumerate(self.crosses):
            seed, made = seed_of(name), [(b"", 1.0)]
            for part in parts:
                made = [
                    (rows + struct.pack("<Q", slot.row), f32(bounded(f32(value * slot.value))))
                    for rows, value in made
                    for slot in groups[part]
                ][:limit]
            groups.append([Slot(len(self.features) + i, row_of(rows, seed), v, False) for rows, v in made])
        return [slot for group in groups for slot in group]


# --- self-test ------------------------------------------------------------------------------------------------------


def tables(doc: str) -> dict[str, list[list[str]]]:
    """The tables of the document that follow a `<!-- vectors: name -->`, without code quotes."""
    found = {}
    for name, body in re.findall(r"<!-- vectors: (\w+) -->\n\n((?:\|.*\n)+)", doc):
        rows = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in body.splitlines()]
        found[name] = rows[2:]
    return found


def self_test(path: pathlib.Path) -> int:
    doc = path.read_text()
    vectors = tables(doc)
    checked = 0

    def same(what: str, got: Any, expected: Any) -> None:
        nonlocal checked
        checked += 1
        if got != expected:
            sys.exit(f"{path}: {what}: got {got}, the document says {expected}")

    for value, text in vectors["texts"]:
        same(f"text of {value}", canonical_text(json.loads(value)), text)
    for feature, text, row in vectors["rows"]:
        raw = {"missing": b"\xff", "default": b"\xfe"}.get(text) or json.loads(text).encode()
        same(f"row of {feature} {text}", f"{row_of(raw, seed_of(feature)):016x}", row)
    for parts, hashed in vectors["ids"]:
        same(f"id of {parts}", f"{id_of(*json.loads(parts)):016x}", hashed)
    for settings, value, text in vectors["numbers"]:
        feature = Feature(0, {"name": "x", "kind": "numeric", **json.loads(settings)})
        slot = feature.encode(json.loads(value))[0]
        label, _, expected = text.partition(" ")
        same(f"{settings} of {value}", slot, feature.slot(label, f32(float(expected or 1))))
    for name, schema, record, slots in re.findall(
        r"<!-- vectors: (record\w*) -->\n\n```json\n(.*?)```\n\n```json\n(.*?)```\n\n```text\n(.*?)```", doc, re.S
    ):
        encoded = Schema.from_json(schema).encode(json.loads(record))
        got = [f"{s.feature} {s.row:016x} {s.value!r} {int(s.missing)}" for s in encoded]
        expected = []
        for line in slots.splitlines():
            feature, row, value, missing = line.split()[:4]
            expected.append(f"{feature} {row} {f32(float(value))!r} {missing}")
        same(name, got, expected)
    if checked < 40:
        sys.exit(f"{path}: only {checked} vectors found; is this the right document?")
    print(f"{checked} vectors agree")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("schema", nargs="?", help="a file with the schema's JSON")
    parser.add_argument("--self-test", action="store_true", help="check the vectors of docs/encoding.md")
    args = parser.parse_args()
    if args.self_test:
        return self_test(pathlib.Path(__file__).resolve().parent.parent / "docs" / "encoding.md")
    if not args.schema:
        parser.error("name a schema, or --self-test")
    schema = Schema.from_json(pathlib.Path(args.schema).read_text())
    for line in sys.stdin:
        for slot in schema.encode(json.loads(line)):
            print(f"{schema.name(slot.feature)}\t{slot.row:016x}\t{slot.value!r}\t{int(slot.missing)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
