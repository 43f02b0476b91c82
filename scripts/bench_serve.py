#!/usr/bin/env python3
"""Answers: `tidemill serve` beside the daemon of Vowpal Wabbit, the same candidates over real connections, in one run on one machine.

    scripts/bench_serve.py [--impressions 1000000] [--candidates 100] [--rounds 6] [--seconds 3]

Both learn the same generated stream (features and crosses of configs/generated.toml) and then answer the same requests: the user of one
impression, the items of others. Three things are measured, by the load generator examples/load.rs on the same machine:

1. *Full speed.* 4 connections, each sends its next request when it has its answer. Candidates a second, and CPU time of the server.
2. *A fixed schedule.* Half of the rate that the daemon reached in 1, the same for both; latencies count from when a request was due.
3. *Reloads.* Tidemill alone at a third of its rate in 1, blocks with another version named every second and blocks without, in turn.

Whatever is compared runs in every round, in alternating order, and each figure is that of its best round: a noisy neighbour only ever takes
away. It takes most from the 99th percentile: believe that of a quiet machine only.

What each does for a request. Tidemill: HTTP/1.1, JSON with the context once and the candidates, answered by JSON with logit,
probability and version. Vowpal Wabbit: its text over TCP, one line a candidate with all its features (this protocol has no context), sent
at once, answered by a line with the probability each; `-t --link logistic`, one child a connection. It does less than the other: its lines
are encoded beforehand (numbers bucketed, bags scaled), and it names no version. The daemon is the one in the package vowpalwabbit of
PyPI, in a process of its own; Python only starts it. That both answer about the same candidates is checked: their logits must agree.
"""

import argparse
import itertools
import json
import math
import os
import pathlib
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.request

import xxhash

import bench
import bench_table
import quality
import snapshot_reader

ROOT = pathlib.Path(__file__).resolve().parent.parent
REQUESTS = 500
DAEMON = """
import sys, vowpalwabbit
from vowpalwabbit.pyvw import pylibvw
pylibvw.vw.run_parser(vowpalwabbit.Workspace(arg_list=sys.argv[1:]))
"""


# --- requests ------------------------------------------------------------------------------------------------------


def write_requests(stream, settings, candidates, bodies, lines):
    """The same requests twice: as bodies for Tidemill, one a line, and as Vowpal Wabbit's text, `candidates` lines each."""
    member = lambda feature: feature.get("from", feature["name"]).split(".")[0]
    features = settings["features"]
    of_item = {member(f) for f in features if f.get("tower") == "item"}
    of_context = {member(f) for f in features if f.get("role") != "presentation"} - of_item
    served = {member(f): f["at_serving"] for f in features if f.get("role") == "presentation"}
    part = lambda record, members: {name: value for name, value in record.items() if name in members}
    chance = random.Random(1)
    pool = list(quality.records(sorted(stream.glob("impressions*"))[:1]))
    with open(bodies, "w") as as_json, open(lines, "w") as as_text:
        for _ in range(REQUESTS):
            context = part(chance.choice(pool), of_context)
            items = [part(chance.choice(pool), of_item) for _ in range(candidates)]
            as_json.write(json.dumps({"context": context, "candidates": items}, separators=(",", ":")) + "\n")
            for item in items:
                parts = [quality.values_of(context | item | served, feature) for feature in features]
                as_text.write(quality.vw_line(parts, True).removeprefix("1") + "\n")


# --- servers -------------------------------------------------------------------------------------------------------


class Server:
    """A process in a session of its own, with its children."""

    def __init__(self, command, log):
        self.log = pathlib.Path(log)
        with open(log, "w") as said:
            self.process = subprocess.Popen([str(c) for c in command], stdout=said, stderr=said, start_new_session=True)

    def wait_for(self, found):
        """What `found` gives once it gives something; the server's end or silence ends the run."""
        until = time.monotonic() + 60
        while time.monotonic() < until and self.process.poll() is None:
            try:
                if result := found():
                    return result
            except OSError:
                pass  # not listening yet
            time.sleep(0.05)
        sys.exit(f"`{self.process.args[0]}` does not say what is waited for:\n{self.log.read_text()[-3000:]}")

    def cpu_seconds(self):
        total = 0
        for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue  # it has ended
            if int(fields[3]) == self.process.pid:  # its session
                total += int(fields[11]) + int(fields[12])
        return total / os.sysconf("SC_CLK_TCK")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Tidemill(Server):
    protocol = "http"

    def __init__(self, binary, store, bodies, log, more=()):
        config = ROOT / "configs/serve.toml"
        settings = [f"store={json.dumps(str(store))}", 'http.listen="127.0.0.1:0"', 'poll="50ms"', *more]
        super().__init__([binary, "serve", "-c", config, *(part for s in settings for part in ("--set", s))], log)
        self.requests = bodies
        says = "listening on http://"
        listening = lambda: [line for line in self.log.read_text().splitlines() if line.startswith(says)]
        self.address = self.wait_for(listening)[0].removeprefix(says)
        self.wait_for(lambda: self.metric("tidemill_serve_swaps_total"))

    def metric(self, name):
        with urllib.request.urlopen(f"http://{self.address}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(f"{name} ")), 0)

    def logits(self, body):
        request = urllib.request.Request(f"http://{self.address}/v1/score", body.encode())
        with urllib.request.urlopen(request) as answer:
            return [score["logit"] for score in json.load(answer)["scores"]]


class Daemon(Server):
    protocol = "lines"

    def __init__(self, model, lines, connections, log):
        port = pathlib.Path(log).with_suffix(".port")
        port.unlink(missing_ok=True)
        options = ["-i", model, "-t", "--link", "logistic", "--quiet", "--daemon", "--foreground", "--num_children", connections, "--port", 0, "--port_file", port]
        super().__init__([sys.executable, "-c", DAEMON, *options], log)
        self.requests = lines
        self.address = f"127.0.0.1:{self.wait_for(lambda: port.is_file() and port.read_text().strip())}"
        self.wait_for(lambda: self.logits([" |a x"]))

    def logits(self, lines):
        host, port = self.address.split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall("".join(line + "\n" for line in lines).encode())
            answer = connection.makefile()
            said = [float(answer.readline()) for _ in lines]
        clipped = [min(max(p, 1e-6), 1 - 1e-6) for p in said]  # six digits are printed
        return [math.log(p / (1 - p)) for p in clipped]


def agree(tidemill, daemon, candidates):
    """Correlation of the logits that both give to the candidates of the first requests."""
    bodies = tidemill.requests.read_text().splitlines()[:20]
    lines = daemon.requests.read_text().splitlines()
    ours = [logit for body in bodies for logit in tidemill.logits(body)]
    theirs = [logit for i in range(len(bodies)) for logit in daemon.logits(lines[i * candidates : (i + 1) * candidates])]
    correlation = statistics.correlation(ours, theirs)
    if correlation < 0.9:
        sys.exit(f"the logits of both correlate by {correlation:.3f} only: they do not answer about the same candidates")
    return correlation


def name_version(store, version):
    """Writes the next entry of the channel, as docs/snapshot-format.md says."""
    folder = store / "channels/live"
    last = max(int(path.stem) for path in folder.glob("*.json"))
    entry = snapshot_reader.read_sealed(store, f"channels/live/{last:012}.json", "tidemill-channel/1")
    entry |= {"number": last + 1, "version": version}
    del entry["check"]
    text = json.dumps(entry, separators=(",", ":"))[:-1].encode()
    sealed = text + f',"check":"{xxhash.xxh3_128_hexdigest(text)}"}}\n'.encode()
    (folder / "next.tmp").write_bytes(sealed)
    (folder / "next.tmp").rename(folder / f"{last + 1:012}.json")


# --- measuring -----------------------------------------------------------------------------------------------------


class Load:
    """The load generator."""

    def __init__(self, binary, candidates, connections):
        self.command = [binary, "--candidates", candidates, "--connections", connections]

    def start(self, server, seconds, rate=None):
        command = [*self.command, "--protocol", server.protocol, "--address", server.address, "--requests", server.requests, "--seconds", seconds]
        command += ["--rate", rate] if rate else []
        return subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, text=True)

    def finish(self, running):
        out = running.communicate()[0]
        if running.returncode:
            sys.exit(f"the load generator failed with {running.returncode}")
        report = json.loads(out)
        if report["failed"] or not report["answered"]:
            sys.exit(f"{report['failed']} requests failed of {report['failed'] + report['answered']}, the first: {report['first_failure']}")
        return report

    def run(self, server, seconds, rate=None):
        before = server.cpu_seconds()
        report = self.finish(self.start(server, seconds, rate))
        report["cpu_seconds"] = server.cpu_seconds() - before
        return report


def reloads(load, server, store, versions, seconds, rate):
    """A block of load with the next of `versions` named every second."""
    swaps, running, began = server.metric("tidemill_serve_swaps_total"), load.start(server, seconds, rate), time.monotonic()
    for second in range(1, seconds):
        time.sleep(max(0, began + second - time.monotonic()))
        version = next(versions)
        name_version(store, version)
    report = load.finish(running)
    report["swaps"] = server.metric("tidemill_serve_swaps_total") - swaps
    server.wait_for(lambda: server.metric("tidemill_serve_version") == version)
    if server.metric("tidemill_serve_refused_total"):
        sys.exit(f"versions were refused:\n{server.log.read_text()[-3000:]}")
    return report


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--impressions", type=int, default=1_000_000, help="of the stream that both learn")
    parser.add_argument("--candidates", type=int, default=100, help="in a request")
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=int, default=3, help="each measurement; blocks with and without reloads take twice as long")
    parser.add_argument("--tidemill", help="path of the binary; default target/release/tidemill")
    parser.add_argument("--rows", type=pathlib.Path, help="append the rows of the table to this file")
    arguments = parser.parse_args()
    binary = quality.find_binary(arguments.tidemill)
    if binary is None or (not arguments.tidemill and "release" not in str(binary)):
        sys.exit("no release binary: run cargo build --release --bin tidemill --example load, or name one with --tidemill")
    generator = binary.parent / "examples/load"
    if not generator.is_file():
        sys.exit(f"`{generator}` is not there: run cargo build --release --example load")
    config = ROOT / "configs/generated.toml"
    settings = tomllib.loads(config.read_text())
    base = quality.target() / "bench"
    plain, text = base / "plain", base / "examples.vw"
    bench.make_stream(binary, plain, arguments.impressions, [])
    bench.make_vw_text(plain, settings, text)
    scratch = pathlib.Path(tempfile.mkdtemp(prefix="serving-", dir=base))
    try:
        measure(arguments, binary, generator, config, settings, plain, text, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def measure(arguments, binary, generator, config, settings, plain, text, scratch):
    store, model = scratch / "store", scratch / "model.vw"
    impressions, clicks = quality.event_files(plain)
    job = {"impressions.source.paths": [str(p) for p in impressions], "clicks.source.paths": [str(p) for p in clicks],
           "checkpoint.dir": str(scratch / "checkpoints"), "snapshots.store": str(store), "publish.every": f"{max(1, arguments.impressions // 5000)}s", "publish.min_interval": "0s", "snapshots.deltas": 0}
    bench.timed([binary, "train", "-c", config, "--until-end", *(part for k, v in job.items() for part in ("--set", f"{k}={json.dumps(v)}"))])
    crosses = [part for pair in quality.interactions(settings["features"], settings.get("crosses", [])) for part in ("--interactions", pair)]
    bench.timed([sys.executable, "-m", "vowpalwabbit", "-b", str(quality.BITS), "--loss_function", "logistic", "--quiet", *crosses, "-d", text, "-f", model])
    manifests = [json.loads(path.read_text()) for path in sorted((store / "manifests").glob("*.json"))[-2:]]
    versions = [manifest["version"] for manifest in manifests]
    bodies, lines = scratch / "bodies.jsonl", scratch / "lines.vw"
    write_requests(plain, settings, arguments.candidates, bodies, lines)
    sizes = [file.stat().st_size / REQUESTS / 1000 for file in (bodies, lines)]

    load = Load(generator, arguments.candidates, arguments.connections)
    least = lambda reports, key: min(report[key] for report in reports)
    with Tidemill(binary, store, bodies, scratch / "tidemill.log") as ours, Daemon(model, lines, arguments.connections, scratch / "vw.log") as theirs:
        correlation = agree(ours, theirs, arguments.candidates)

        def both(rate=None):
            reports = {ours: [], theirs: []}
            for server in reports:
                load.run(server, 1, rate)  # warm
            for n in range(arguments.rounds):
                for server in (ours, theirs) if n % 2 else (theirs, ours):
                    reports[server].append(load.run(server, arguments.seconds, rate))
            return reports[ours], reports[theirs]

        full = both()
        speed = [max(report["candidates_per_second"] for report in reports) for reports in full]
        cpu = [min(r["cpu_seconds"] / (r["answered"] * arguments.candidates) * 1e6 for r in reports) for reports in full]
        half = speed[1] / arguments.candidates / 2
        scheduled = both(half)
        os.killpg(theirs.process.pid, signal.SIGSTOP)
        third, block = speed[0] / arguments.candidates / 3, 2 * arguments.seconds
        quiet, reloading, others = [], [], itertools.cycle(versions)  # the second of them serves
        for n in range(arguments.rounds):
            steps = [lambda: quiet.append(load.run(ours, block, third)), lambda: reloading.append(reloads(load, ours, store, others, block, third))]
            for step in steps if n % 2 else reversed(steps):
                step()

    table, peer = bench_table.Rows("serving", arguments.rows), "Vowpal Wabbit daemon"
    table.add("full speed, 4 connections", speed[0] / 1e6, "M candidates/s", peer, speed[1] / 1e6)
    for q in ("p50", "p99"):
        table.add(f"full speed, {q} of a request", least(full[0], f"{q}_us"), "us", peer, least(full[1], f"{q}_us"))
    table.add("full speed, CPU of the server a candidate", cpu[0], "us", peer, cpu[1])
    for q in ("p50", "p99"):
        table.add(f"{half:.0f} requests/s on schedule, {q}", least(scheduled[0], f"{q}_us"), "us", peer, least(scheduled[1], f"{q}_us"))
    for q in ("p50", "p99"):
        table.add(f"{third:.0f} requests/s, a reload every second, {q}", least(reloading, f"{q}_us"), "us", "without reloads", least(quiet, f"{q}_us"))
    answered = sum(r["answered"] for r in reloading)
    print(f"\n{arguments.candidates} candidates a request; a request is {sizes[0]:.1f} kB for tidemill, {sizes[1]:.1f} kB for Vowpal Wabbit; {manifests[-1]['rows']} rows; "
          f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; the best of {arguments.rounds} rounds of {arguments.seconds} s\n"
          f"logits of both correlate by {correlation:.3f}; {sum(r['swaps'] for r in reloading):.0f} versions of {manifests[-1]['rows']} rows swapped in under "
          f"{answered} requests, 0 failed\n")
    table.print()


if __name__ == "__main__":
    main()
