#!/usr/bin/env python3
"""A node of 1M rows under a fixed schedule of requests, a new version every few seconds, deltas as they come from a trainer.

    scripts/bench_reload.py [--minutes 5] [--every 5] [--versions 70] [--step 1500] [--cache]

1. A trainer follows a log that this script lets grow: first the rows, then step by step, each time until its version is in the store. Of
   every delta: rows touched, bytes beside those of the full in its place, and the time from the append to the version.
2. A node serves a copy of that store, and the load generator examples/load.rs asks it on a fixed schedule, at a third of what it reached
   without one; latencies count from when a request was due. Minutes in which a version is named every few seconds (one of 21 is a full)
   and minutes in which none is, in turn, as many of each. Memory is that of the node's process, less the files that it has mapped.

Fails if a request fails, a version is refused, or the node's memory grows past twice what it was.
Percentiles are the least of the minutes of a kind: a noisy neighbour only ever takes away. Run with .venv/bin/python.
"""

import argparse
import json
import pathlib
import shutil
import statistics
import sys
import tempfile
import threading
import time
import tomllib

import xxhash

import bench
import bench_table
import quality
from bench_serve import Load, Server, Tidemill, name_version, write_requests

ROOT = pathlib.Path(__file__).resolve().parent.parent


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5, help="with reloads, and as many without")
    parser.add_argument("--every", type=float, default=5, help="seconds between versions")
    parser.add_argument("--impressions", type=int, default=1_000_000, help="before the first version")
    parser.add_argument("--versions", type=int, default=70)
    parser.add_argument("--step", type=int, default=1500, help="impressions a version")
    parser.add_argument("--precision", default="f32", choices=["f32", "f16", "int8"])
    parser.add_argument("--model", default="logistic", choices=["logistic", "two_tower"])
    parser.add_argument("--cache", action="store_true", help="the node maps its fulls from a cache, not from temporary files")
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--tidemill", help="path of the binary; default target/release/tidemill")
    parser.add_argument("--rows", type=pathlib.Path, help="append the rows of the table to this file")
    arguments = parser.parse_args()
    binary = quality.find_binary(arguments.tidemill)
    if binary is None or (not arguments.tidemill and "release" not in str(binary)):
        sys.exit("no release binary: run cargo build --release --bin tidemill --example load, or name one with --tidemill")
    generator = binary.parent / "examples/load"
    if not generator.is_file():
        sys.exit(f"`{generator}` is not there: run cargo build --release --example load")
    scratch = pathlib.Path(tempfile.mkdtemp(prefix="tidemill-reload-"))
    try:
        measure(arguments, binary, generator, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def train(arguments, binary, home, stream):
    """Lets a log grow under a trainer. Returns the times from an append to its version, in seconds."""
    log = home / "log"
    log.mkdir()
    lines = (stream / "impressions-000.jsonl").read_bytes().splitlines(keepends=True)
    steps = [lines[: arguments.impressions]]
    steps += [lines[at : at + arguments.step] for at in range(arguments.impressions, len(lines), arguments.step)][: arguments.versions]
    settings = {
        "impressions.source.paths": [str(log / "impressions.jsonl")],
        "clicks.source.paths": [str(stream / "clicks-000.jsonl")],
        "impressions.source.poll": "10ms",
        "impressions.max_out_of_order": "1s",
        "impressions.max_ahead": "1s",
        "clicks.max_out_of_order": "1s",
        "clicks.max_ahead": "1s",
        "join.window": "40s",
        "batch.period": "1s",
        "model.kind": arguments.model,
        "checkpoint.dir": str(home / "checkpoints"),
        "checkpoint.every": "1000h",
        "snapshots.store": str(home / "store"),
        "snapshots.precision": arguments.precision,
        "snapshots.keep": 10_000,
        "publish.every": "2s",
        "publish.min_interval": "0s",
    }
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    manifests = home / "store/manifests"
    count = lambda: len(list(manifests.glob("*.json")))
    times = []
    (log / "impressions.jsonl").write_bytes(b"")
    with Server([binary, "train", "-c", ROOT / "configs/generated.toml", *sets], home / "train.log") as trainer:
        for step, chunk in enumerate(steps):
            before, began = count(), time.monotonic()
            with open(log / "impressions.jsonl", "ab") as out:
                out.write(b"".join(chunk))
            trainer.wait_for(lambda: count() > before)
            times.append(time.monotonic() - began)
            if step == 0:  # it publishes as it goes through them
                while count() > before:
                    before = count()
                    time.sleep(2)
            else:
                time.sleep(0.1)  # at most one version more
    return times[1:]


def measure(arguments, binary, generator, scratch):
    stream, home = scratch / "stream", scratch / "job"
    home.mkdir()
    total = arguments.impressions + arguments.step * arguments.versions + 40_000
    bench.timed([binary, "generate", "--out", stream, "-n", total, "--rate", "500", "--users", "300000", "--items", "100000", "--window", "40s", "--delay-median", "5s"])
    times = train(arguments, binary, home, stream)

    store = home / "store"
    manifests = [json.loads(path.read_text()) for path in sorted((store / "manifests").glob("*.json"))]
    settled = manifests[-arguments.versions :]
    deltas = [m for m in settled if m["delta"]]
    share = lambda m: m["delta"]["changed"] / m["rows"]
    size = lambda m: m["objects"][0]["length"] / m["delta"]["result"]["length"]
    rows = settled[-1]["rows"]

    # The node's store: all of it, and a channel that names the first.
    served = scratch / "served"
    shutil.copytree(store, served)
    entries = sorted((served / "channels/live").glob("*.json"))
    versions = iter([m["version"] for m in settled])
    first = json.loads(entries[0].read_text()) | {"version": next(versions)}
    del first["check"]
    for entry in entries:
        entry.unlink()
    text = json.dumps(first, separators=(",", ":"))[:-1].encode()
    entries[0].write_bytes(text + f',"check":"{xxhash.xxh3_128_hexdigest(text)}"}}\n'.encode())

    settings = tomllib.loads((ROOT / "configs/generated.toml").read_text())
    bodies = scratch / "bodies.jsonl"
    write_requests(stream, settings, arguments.candidates, bodies, scratch / "lines.vw")
    load, minute = Load(generator, arguments.candidates, 4), 60
    memory, watching = {}, threading.Event()
    cache = [f"cache={json.dumps(str(scratch / 'cache'))}"] if arguments.cache else []
    line = "RssAnon"  # what is mapped from files the system takes back when it wants it
    with Tidemill(binary, served, bodies, scratch / "serve.log", cache) as node:
        resident = lambda: next(int(l.split()[1]) for l in pathlib.Path(f"/proc/{node.process.pid}/status").read_text().splitlines() if l.startswith(line)) / 1024
        load.run(node, 2)
        full = max(load.run(node, 4)["candidates_per_second"] for _ in range(3))
        third = full / arguments.candidates / 3
        memory["before"] = resident()
        memory["most"] = memory["before"]

        def watch():
            while not watching.wait(0.05):
                memory["most"] = max(memory["most"], resident())

        watcher = threading.Thread(target=watch)
        watcher.start()
        reports = {"with": [], "without": []}
        swaps = lambda: node.metric("tidemill_serve_swaps_total")
        seconds, loads = [], swaps()
        whole = max(1, round(arguments.minutes))
        length = arguments.minutes * minute / whole
        for n in range(whole):
            for kind in ("with", "without") if n % 2 else ("without", "with"):
                running, began = load.start(node, round(length), third), time.monotonic()
                if kind == "with":
                    due = began + arguments.every
                    while due < began + length - 1 and (version := next(versions, None)):
                        time.sleep(max(0, due - time.monotonic()))
                        name_version(served, version)
                        node.wait_for(lambda: node.metric("tidemill_serve_version") == version)
                        seconds.append(time.monotonic() - due)
                        due += arguments.every
                reports[kind].append(load.finish(running))
        watching.set()
        watcher.join()
        loads = swaps() - loads
        if node.metric("tidemill_serve_refused_total"):
            sys.exit(f"versions were refused:\n{node.log.read_text()[-3000:]}")

    least = lambda kind, q: min(report[f"{q}_us"] for report in reports[kind])
    middle = statistics.median
    print(
        f"{rows} rows, {arguments.model}, {arguments.precision}; {len(deltas)} deltas of {len(settled)} versions: {100 * middle(map(share, deltas)):.2f} % of the rows touched, "
        f"{100 * middle(map(size, deltas)):.2f} % of the bytes of a full ({middle(m['objects'][0]['length'] for m in deltas) / 1e6:.2f} of {middle(m['delta']['result']['length'] for m in deltas) / 1e6:.1f} MB)\n"
        f"append to version in the store: median {middle(times):.2f} s, most {max(times):.2f} s; version named to served: median {middle(seconds):.2f} s, most {max(seconds):.2f} s\n"
        f"{sum(r['answered'] for kind in reports.values() for r in kind)} requests of {arguments.candidates} candidates at {third:.0f}/s, 0 failed, {loads:.0f} versions swapped in; "
        f"memory of the node {memory['before']:.0f} MiB, at most {memory['most']:.0f} MiB\n"
    )
    table = bench_table.Rows("reload", arguments.rows)
    for q in ("p50", "p99"):
        table.add(f"{third:.0f} requests/s, a version every {arguments.every:g} s, {q}", least("with", q), "us", "without", least("without", q))
    table.add("bytes of a delta", middle(m["objects"][0]["length"] for m in deltas) / 1e6, "MB", "a full", middle(m["delta"]["result"]["length"] for m in deltas) / 1e6)
    table.print()
    if memory["most"] > 2 * memory["before"] + 50:
        sys.exit(f"the node's memory grew from {memory['before']:.0f} to {memory['most']:.0f} MiB")


if __name__ == "__main__":
    main()
