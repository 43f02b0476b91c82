#!/usr/bin/env python3
"""Events to weights: `tidemill train` from JSON lines, beside Vowpal Wabbit learning the same examples, in one run on one machine.

    scripts/bench.py [--impressions 1000000] [--rounds 3] [-c configs/generated.toml] [--set key=value ...]

Makes a stream with `tidemill generate` (kept under target/bench), and Vowpal Wabbit's text of the same examples. In each round every
contestant runs once, one after the other, so that a noisy neighbour hits all; the table gives each one's best and median round, and the
ratio to Vowpal Wabbit from text. CPU seconds per million impressions are steadier than wall time on a machine that is shared.

Tidemill reads, decodes, joins, encodes, learns, keeps all counters and progressive metrics, checkpoints and publishes. Vowpal Wabbit is
given more than that: its text is joined, labelled and encoded beforehand, outside of the measured time; the cache is its own binary form
of that text. Both learn the same features and crosses, one pass, logistic loss. Peak memory is that of the process.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib

import bench_table
import quality

ROOT = pathlib.Path(__file__).resolve().parent.parent


def timed(command, cwd=ROOT):
    """(seconds, peak MiB, CPU seconds, stdout and stderr) of a process; its failure ends the run."""
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen([str(c) for c in command], cwd=cwd, stdout=subprocess.PIPE, stderr=said, text=True)
        out = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        err = said.read()
    peak = usage.ru_maxrss / (1024 * 1024 if sys.platform == "darwin" else 1024)
    if process.returncode:
        sys.exit(f"`{' '.join(map(str, command))}` failed with {process.returncode}:\n{err[-3000:]}")
    return seconds, peak, usage.ru_utime + usage.ru_stime, out, err


def make_stream(binary, out, impressions, more):
    """A generated stream, made once for each set of options."""
    options = ["--impressions", str(impressions), "--rate", "500", *more]
    made = out / "options.json"
    if made.is_file() and json.loads(made.read_text()) == options:
        return
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    subprocess.run([str(binary), "generate", "--out", str(out), *options], check=True, stdout=subprocess.DEVNULL)
    made.write_text(json.dumps(options))


def make_vw_text(stream, settings, text):
    """The examples of a plain stream as Vowpal Wabbit's text, in order of arrival, labels from the truth."""
    features = settings["features"]
    if text.is_file() and text.stat().st_mtime > (stream / "options.json").stat().st_mtime:
        return
    with open(stream / "truth.csv") as lines:
        next(lines)
        labels = {line[:16]: line.rstrip()[-1] == "1" for line in lines}
    with open(text, "w") as out:
        for record in quality.records(sorted(stream.glob("impressions*"))):
            parts = [quality.values_of(record, feature) for feature in features]
            out.write(quality.vw_line(parts, labels[record["id"]]) + "\n")


def cpu_and_peak(runs, count):
    """(least CPU seconds a million impressions, most MiB) of some runs."""
    return min(run[2] for run in runs) / count * 1e6, max(run[1] for run in runs)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--impressions", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-c", "--config", default=ROOT / "configs/generated.toml", type=pathlib.Path)
    parser.add_argument("--set", action="append", default=[], help="a setting for tidemill train, key=value")
    parser.add_argument("--tidemill", help="path of the binary; default target/release/tidemill")
    parser.add_argument("--rows", type=pathlib.Path, help="append the rows of the table of scripts/bench.sh to this file")
    arguments = parser.parse_args()
    binary = quality.find_binary(arguments.tidemill)
    if binary is None or (not arguments.tidemill and "release" not in str(binary)):
        sys.exit("no release binary: run cargo build --release, or name one with --tidemill")
    settings = tomllib.loads(arguments.config.read_text())
    base = quality.target() / "bench"
    plain, packed, quarter = base / "plain", base / "zst", base / "quarter"
    make_stream(binary, plain, arguments.impressions, [])
    make_stream(binary, packed, arguments.impressions, ["--zst"])
    make_stream(binary, quarter, arguments.impressions // 4, [])
    text, cache = base / "examples.vw", base / "examples.cache"
    make_vw_text(plain, settings, text)
    crosses = [part for pair in quality.interactions(settings["features"], settings.get("crosses", [])) for part in ("--interactions", pair)]
    vw = [sys.executable, "-m", "vowpalwabbit", "-b", str(quality.BITS), "--loss_function", "logistic", *crosses]
    cache.unlink(missing_ok=True)
    timed([*vw, "-d", text, "--cache_file", cache, "-k"])  # writes the cache
    stats = json.loads((plain / "stats.json").read_text())

    scratch = base / "scratch"

    def tidemill(stream):
        shutil.rmtree(scratch, ignore_errors=True)  # a job of its own each time, nothing to resume
        command = [binary, "train", "-c", arguments.config.resolve(), "--until-end", "--json"]
        for kind, paths in zip(("impressions", "clicks"), quality.event_files(stream)):
            command += ["--set", f"{kind}.source.paths={json.dumps([str(p) for p in paths])}"]
        for setting in [f"checkpoint.dir={json.dumps(str(scratch / 'c'))}", f"snapshots.store={json.dumps(str(scratch / 's'))}", *arguments.set]:
            command += ["--set", setting]
        seconds, peak, cpu, out, _ = timed(command)
        report = json.loads(out)
        expected = json.loads((stream / "stats.json").read_text())["impressions"]
        if report["examples"] != expected:
            sys.exit(f"tidemill trained {report['examples']} examples of {expected}; the figures would not be comparable")
        return seconds, peak, cpu, report

    def vowpal_wabbit(*source):
        seconds, peak, cpu, out, err = timed([*vw, *source])
        if f"number of examples = {arguments.impressions}\n" not in out + err:
            sys.exit(f"Vowpal Wabbit did not learn {arguments.impressions} examples:\n{(out + err)[-2000:]}")
        return seconds, peak, cpu

    runs = {
        "tidemill train, JSON lines": (arguments.impressions, lambda: tidemill(plain)),
        "tidemill train, JSON lines, zstd": (arguments.impressions, lambda: tidemill(packed)),
        "tidemill train, a quarter of them": (arguments.impressions // 4, lambda: tidemill(quarter)),
        "vowpal wabbit, joined text": (arguments.impressions, lambda: vowpal_wabbit("-d", text)),
        "vowpal wabbit, its cache": (arguments.impressions, lambda: vowpal_wabbit("-d", text, "--cache_file", cache)),
    }
    results = {name: [] for name in runs}
    for _ in range(arguments.rounds):
        for name, (_, run) in runs.items():
            results[name].append(run())
    shutil.rmtree(scratch, ignore_errors=True)

    megabytes = sum(p.stat().st_size for p in quality.event_files(plain)[0]) / 1e6
    print(f"\n{arguments.impressions} impressions, {stats['clicks']} clicks, {megabytes:.0f} MB of JSON lines; {os.cpu_count()} cores, "
          f"load {os.getloadavg()[0]:.1f}; {arguments.rounds} rounds, whole processes\n")
    print(f"{'':36}{'best M/s':>9}{'median':>9}{'vs VW text':>12}{'CPU s/M':>9}{'peak MiB':>10}")
    reference = min(r[0] for r in results["vowpal wabbit, joined text"]) / arguments.impressions
    rows = bench_table.Rows("events", arguments.rows)
    text_cpu, text_peak = cpu_and_peak(results["vowpal wabbit, joined text"], arguments.impressions)
    for name, (count, _) in runs.items():
        seconds = sorted(r[0] for r in results[name])
        best, (cpu, peak) = count / seconds[0], cpu_and_peak(results[name], count)
        ratio = reference * best
        print(f"{name:36}{best / 1e6:9.3f}{count / statistics.median(seconds) / 1e6:9.3f}{ratio:11.2f}x{cpu:9.2f}{peak:10.0f}")
        if name != "vowpal wabbit, joined text":
            rows.add(name, best / 1e6, "M impressions/s", "vowpal wabbit, joined text", 1 / reference / 1e6)
            rows.add(f"{name}: CPU a million", cpu, "s", "vowpal wabbit, joined text", text_cpu)
            rows.add(f"{name}: peak memory", peak, "MiB", "vowpal wabbit, joined text", text_peak)
    report = results["tidemill train, JSON lines"][0][3]
    print(f"\ntidemill's own clock {max(r[3]['impressions_per_second'] for r in results['tidemill train, JSON lines']) / 1e6:.3f} M impressions/s; "
          f"one-pass logloss {report['metrics']['logloss']:.5f} (constant {stats['constant_logloss']:.5f}, truth {stats['best_logloss']:.5f})")


if __name__ == "__main__":
    main()
