#!/usr/bin/env python3
"""The drain: `tidemill train` from Kafka beside a bare rdkafka consumer on the same topics, in one run on one machine.

    scripts/bench_kafka.py [--impressions 2000000] [--rounds 3] [--window 1h] [--bound 768]

Starts a real Kafka (scripts/services.sh), generates a stream and writes it into two topics of 4 partitions with `tidemill replay`. In each
round the bare consumer (examples/drain.rs: default settings, payloads are not even looked at) and Tidemill (fetches, decodes, joins,
encodes, learns, counts, checkpoints, publishes) read both topics from beginning to end, whole processes, one after the other. Impressions
a second count the impressions only, for both; the clicks are read beside. With the window of an hour, an hour of impressions waits for its
clicks all the time: the peak memory is that of a process which leaves them in the broker. It fails where that is above --bound MiB, or
where more impressions were in memory than a partition's disorder explains.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import bench
import bench_table

ROOT = pathlib.Path(__file__).resolve().parent.parent

JOB = """
[kafka]
brokers = "{brokers}"

[impressions]
source = {{ kind = "kafka", topics = ["impressions"] }}

[clicks]
source = {{ kind = "kafka", topics = ["clicks"] }}

[join]
window = "{window}"
max_lateness = "1m"

[checkpoint]
dir = "{dir}/checkpoints"
every = "10s"

[snapshots]
store = "{dir}/snapshots"
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--impressions", type=int, default=2_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--window", default="1h", help="attribution window")
    parser.add_argument("--bound", type=int, default=768, help="most MiB of memory that Tidemill may take")
    parser.add_argument("--rows", type=pathlib.Path, help="append the rows of the table of scripts/bench.sh to this file")
    arguments = parser.parse_args()

    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    binary, drain = target / "release/tidemill", target / "release/examples/drain"
    services = {**os.environ, "TIDEMILL_SERVICES": str(target / "bench/services")}
    service = lambda *words: subprocess.run([ROOT / "scripts/services.sh", *words], env=services, check=True)  # noqa: E731
    service("up", "kafka")
    try:
        env = (target / "bench/services/kafka/env").read_text()
        brokers = dict(line.split("=", 1) for line in env.splitlines())["TIDEMILL_TEST_KAFKA"]
        stream = target / "bench/kafka-stream"
        more = ["--users", "200000", "--items", "20000", "--partitions", "1"]
        bench.make_stream(binary, stream, arguments.impressions, more)
        for topic in ("impressions", "clicks"):
            options = ["--partitions", "4", "--config", "retention.ms=-1"]
            service("kafka", "topics", "--create", "--topic", topic, *options)
        features = (ROOT / "configs/generated.toml").read_text()
        features = features[features.index("[[features]]") :]

        def train(folder):
            job = folder / "job.toml"
            job.write_text(JOB.format(brokers=brokers, window=arguments.window, dir=folder) + features)
            return job

        with tempfile.TemporaryDirectory() as folder:
            job = train(pathlib.Path(folder))
            files = [f"--{name}={stream}/{name}*" for name in ("impressions", "clicks")]
            seconds, *_ = bench.timed([binary, "replay", "-c", job, *files])
            print(f"written in {seconds:.1f} s", flush=True)

        bare, ours = [], []
        for round_ in range(arguments.rounds):
            seconds, peak, cpu, out, _ = bench.timed([drain, brokers, "impressions", "clicks"])
            bare.append((json.loads(out)["seconds"], peak, cpu))
            with tempfile.TemporaryDirectory() as folder:
                job = train(pathlib.Path(folder))
                seconds, peak, cpu, out, _ = bench.timed([binary, "train", "-c", job, "--until-end", "--json"])
            summary = json.loads(out)
            if summary["impression_gap"] or summary["counts"]["impressions"] < arguments.impressions:
                sys.exit(f"not every impression was trained: {out}")
            ours.append((seconds, peak, cpu, summary["peak_pending_impressions"]))
            print(f"round {round_ + 1}: bare {bare[-1][0]:.2f} s, tidemill {seconds:.2f} s, peak {peak:.0f} MiB", flush=True)
    finally:
        service("down", "kafka")

    rate = lambda rounds: arguments.impressions / min(row[0] for row in rounds) / 1e6  # noqa: E731
    waiting = 500 * 3600 if arguments.window == "1h" else "those"  # bench.make_stream has 500 a second
    peak, pending = max(row[1] for row in ours), max(row[3] for row in ours)
    print(f"\nimpressions in memory at most {pending}, of {waiting} that wait for their window; machine load {os.getloadavg()[0]:.1f}")
    if peak > arguments.bound or pending > 50_000:
        sys.exit(f"{peak:.0f} MiB at most {arguments.bound} were allowed; {pending} impressions in memory, 50000 were")
    rows = bench_table.Rows("kafka", arguments.rows)
    rows.add("tidemill, from kafka", rate(ours), "M impressions/s", "bare rdkafka consumer", rate(bare))
    cpus = [min(row[2] for row in rounds) / arguments.impressions * 1e6 for rounds in (ours, bare)]
    rows.add("tidemill, from kafka: CPU a million", cpus[0], "s", "bare rdkafka consumer", cpus[1])
    rows.add("tidemill, from kafka: peak memory", peak, "MiB", "bare rdkafka consumer", max(row[1] for row in bare))


if __name__ == "__main__":
    main()
