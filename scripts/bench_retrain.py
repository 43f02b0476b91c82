#!/usr/bin/env python3
"""The speed of a full retrain: `tidemill retrain` over the same events from JSON lines, from Parquet and from Kafka, in one run on one machine.

    scripts/bench_retrain.py [--impressions 1000000] [--rounds 2] [--no-kafka]

Generates a stream of 500 impressions a second of event time, writes it as JSON lines, as Parquet (by pyarrow, Snappy, dictionaries) and
into two topics of a real Kafka with 4 partitions each (scripts/services.sh), and retrains from nothing over each in turn, whole processes.
Events are impressions and clicks. Hours of log a minute hold for that rate. The model must come out the same from JSON lines and Parquet.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import tempfile

import bench
import bench_table
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = pathlib.Path(__file__).resolve().parent.parent

JOB = """
{kafka}
[impressions]
source = {{ {impressions} }}
[clicks]
source = {{ {clicks} }}
[join]
window = "1m"
max_lateness = "1m"
[checkpoint]
dir = "{dir}/checkpoints"
[snapshots]
store = "{dir}/snapshots"
"""


def parquet(stream, out):
    """Each file of lines as one of Parquet."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for path in sorted(stream.glob("*.jsonl")):
        with open(path) as lines:
            rows = [json.loads(line) for line in lines]
        pq.write_table(pa.Table.from_pylist(rows), out / f"{path.stem}.parquet", row_group_size=1 << 17)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--impressions", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--no-kafka", action="store_true")
    parser.add_argument("--rows", type=pathlib.Path, help="append the rows of the table of scripts/bench.sh to this file")
    arguments = parser.parse_args()

    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    binary, stream, columns = target / "release/tidemill", target / "bench/retrain-stream", target / "bench/retrain-parquet"
    more = ["--users", "200000", "--items", "20000", "--partitions", "2"]
    bench.make_stream(binary, stream, arguments.impressions, more)
    parquet(stream, columns)
    features = (ROOT / "configs/generated.toml").read_text()
    features = features[features.index("[[features]]") :]
    files = lambda folder, stream: f'paths = ["{folder}/{stream}-*"]'  # noqa: E731
    sources = {
        "JSON lines": ("", files(stream, "impressions"), files(stream, "clicks")),
        "Parquet": ("", files(columns, "impressions"), files(columns, "clicks")),
    }
    services = {**os.environ, "TIDEMILL_SERVICES": str(target / "bench/services")}
    service = lambda *words: subprocess.run([ROOT / "scripts/services.sh", *words], env=services, check=True)  # noqa: E731

    def run(name, scratch, command, more=()):
        folder = pathlib.Path(scratch) / name.replace(" ", "-") / command
        folder.mkdir(parents=True, exist_ok=True)
        kafka, impressions, clicks = sources[name]
        job = folder / "job.toml"
        job.write_text(JOB.format(kafka=kafka, impressions=impressions, clicks=clicks, dir=folder) + features)
        words = [binary, command, "-c", job, "--json", *more]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{name}: {done.stderr}")
        return json.loads(done.stdout)

    with tempfile.TemporaryDirectory() as scratch:
        try:
            if not arguments.no_kafka:
                service("up", "kafka")
                env = dict(line.split("=", 1) for line in (target / "bench/services/kafka/env").read_text().splitlines())
                for topic in ("impressions", "clicks"):
                    service("kafka", "topics", "--create", "--topic", topic, "--partitions", "4", "--config", "retention.ms=-1")
                topics = [f'kind = "kafka", topics = ["{topic}"]' for topic in ("impressions", "clicks")]
                sources["Kafka"] = (f'[kafka]\nbrokers = "{env["TIDEMILL_TEST_KAFKA"]}"', *topics)
                run("Kafka", scratch, "replay", [f"--{name}={stream}/{name}*" for name in ("impressions", "clicks")])
            best = {}
            for number in range(arguments.rounds):
                for name in sources:
                    shutil.rmtree(pathlib.Path(scratch) / name.replace(" ", "-") / "retrain", ignore_errors=True)
                    report = run(name, scratch, "retrain", ["--promote", "never"])
                    candidate = report["candidate"]
                    events = candidate["read"]["impressions_read"] + candidate["read"]["clicks_read"]
                    figures = (events / report["seconds"], report["hours_per_minute"], candidate["model_digest"])
                    best[name] = max(best.get(name, figures), figures)
                    print(f"round {number + 1}: {name:10} {figures[0]:>10,.0f} events/s, {figures[1]:6.1f} hours of log a minute", flush=True)
        finally:
            if not arguments.no_kafka:
                service("down")
    print(f"\nbest of {arguments.rounds}, {arguments.impressions:,} impressions, 500 a second of event time")
    table, lines = bench_table.Rows("retrain", arguments.rows), best.pop("JSON lines")
    table.add("hours of log at 500 impressions/s, from JSON lines", lines[1], "h/minute")
    for name, (rate, *_) in best.items():
        table.add(f"events from {name}", rate / 1e6, "M/s", "JSON lines", lines[0] / 1e6)
    table.print()
    if lines[2] != best["Parquet"][2]:
        raise SystemExit("JSON lines and Parquet gave other models")


if __name__ == "__main__":
    main()
