#!/usr/bin/env python3
"""Examples a second of the two-tower model beside PyTorch, in one run on one machine.

    pip install torch numpy
    scripts/bench_towers.py [--rows 1000000] [--more-rows 10000000] [--rounds 3] [--seconds 6] [--layers 64,32] [--device cuda:0]

12 ids an example, six a tower, each feature Zipf(1) over its share of the rows; vectors of 16, towers 96-64-32 or 96 and `--layers`, batches of
1024 of which no two are alike, labels drawn at 5 %. PyTorch: nn.Embedding(sparse=True) with Adagrad, the layers with Adam, at its best of 1 and all threads; ids come
as ready indices, so it looks up no hash. Tidemill: `cargo bench --bench towers`, ids looked up by their 64 bits, rows admitted, counters on. Both
with the wide part (a weight an id; PyTorch's learns by batch, ours example by example) and without. In each round every contestant runs once.

`--device` runs both on a GPU too: PyTorch's tables and layers lie there, with batches that are there already; of Tidemill's the layers, which is what
`device` means. `--program` is a bench built elsewhere (`scripts/build_cuda.sh bench --bench towers --no-run` names it), where there is no cargo.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
FEATURES, DIM, BATCH = 12, 16, 1024


def pytorch(rows, threads, seconds, wide, layers, device):
    import numpy as np
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(1)
    chance = np.random.default_rng(7)
    share, batches = rows // FEATURES, 128
    ranks = np.exp(chance.random((batches, BATCH, FEATURES)) * np.log(share)).astype(np.int64)
    ids = torch.from_numpy(ranks % share + np.arange(FEATURES) * share).to(device)
    labels = torch.from_numpy((chance.random((batches, BATCH)) < 0.05).astype(np.float32)).to(device)
    torch.set_default_device(device)
    table = torch.nn.Embedding(rows, DIM, sparse=True)
    torch.nn.init.uniform_(table.weight, -0.05, 0.05)
    weights = torch.nn.Embedding(rows, 1, sparse=True)
    torch.nn.init.zeros_(weights.weight)
    bias = torch.nn.Parameter(torch.zeros(1))

    def tower():
        sizes, parts = [FEATURES // 2 * DIM, *layers], []
        for inputs, outputs in zip(sizes, layers):
            parts += [torch.nn.Linear(inputs, outputs), torch.nn.ReLU()]
        return torch.nn.Sequential(*parts[:-1])

    user, item = tower(), tower()
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    sparse = torch.optim.Adagrad([table.weight, *([weights.weight] if wide else [])], 0.05, initial_accumulator_value=0.01)
    dense = torch.optim.Adam([*user.parameters(), *item.parameters(), bias], 1e-3)
    loss_of = torch.nn.BCEWithLogitsLoss(reduction="sum")

    def step(i):
        rows = ids[i]
        vectors = table(rows)
        logit = (user(vectors[:, :6].flatten(1)) * item(vectors[:, 6:].flatten(1))).sum(1) + bias
        if wide:
            logit = logit + weights(rows).sum((1, 2))
        loss = loss_of(logit, labels[i])
        sparse.zero_grad()
        dense.zero_grad()
        loss.backward()
        sparse.step()
        dense.step()

    for i in range(8):
        step(i)
    rates, began = [], time.perf_counter()
    while time.perf_counter() - began < seconds or len(rates) < 3:
        start = time.perf_counter()
        for i in range(batches // 4):
            step(int(chance.integers(batches)))
        wait()
        rates.append(batches // 4 * BATCH / (time.perf_counter() - start))
    rates.sort()
    return {"best": rates[-1], "median": rates[len(rates) // 2]}


def run(command, **settings):
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"`{' '.join(command)}` failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--more-rows", type=int, default=10_000_000, help="Tidemill alone, once more over so many rows; 0: not")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=6)
    parser.add_argument("--layers", default="64,32", help="outputs of each layer of a tower")
    parser.add_argument("--device", help="a GPU, on which both run too: cuda:0")
    parser.add_argument("--program", help="the bench, built already")
    parser.add_argument("--pytorch", nargs=5, metavar=("ROWS", "THREADS", "SECONDS", "WIDE", "DEVICE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.pytorch:
        rows, threads, seconds, wide = map(int, args.pytorch[:4])
        print(json.dumps(pytorch(rows, threads, seconds, bool(wide), [int(n) for n in args.layers.split(",")], args.pytorch[4])))
        return
    cores, seconds = os.cpu_count(), str(args.seconds)
    build = ["scripts/build_cuda.sh", "bench"] if args.device else ["cargo", "bench"]
    ours = [args.program] if args.program else [*build, "--bench", "towers"]
    contestants = {}
    for wide in "10":
        what = "with the wide part" if wide == "1" else "towers alone"
        runs = [(threads, "cpu") for threads in sorted({1, cores})] + ([(cores, args.device)] if args.device else [])
        for threads, device in runs:
            where = f"{what}, {threads} threads" + (f" and {device}" if device != "cpu" else "")
            theirs = [sys.executable, __file__, "--layers", args.layers, "--pytorch", str(args.rows), str(threads), seconds, wide, device]
            contestants[f"PyTorch, {where}"] = (theirs, {})
            settings = {"THREADS": str(threads), "SECONDS": seconds, "WIDE": wide, "ROWS": str(args.rows), "LAYERS": args.layers}
            contestants[f"Tidemill, {where}"] = (ours, {**settings, "DEVICE": device})
    if args.more_rows:
        settings = {"THREADS": str(cores), "SECONDS": seconds, "WIDE": "1", "ROWS": str(args.more_rows), "LAYERS": args.layers}
        contestants[f"Tidemill, with the wide part, {cores} threads, {args.more_rows:,} rows"] = (ours, settings)
    results = {name: [] for name in contestants}
    for _ in range(args.rounds):
        for name, (command, settings) in contestants.items():
            results[name].append(run(command, **settings))
    print(f"{'':66} best M/s   median M/s")
    best = {}
    for name, rounds in results.items():
        best[name] = max(r["best"] for r in rounds)
        median = sorted(r["median"] for r in rounds)[len(rounds) // 2]
        more = f"   {rounds[0]['bytes_a_row']} bytes a row" if "bytes_a_row" in rounds[0] else ""
        print(f"{name:66} {best[name] / 1e6:8.3f}   {median / 1e6:10.3f}{more}")
    for what in "with the wide part", "towers alone":
        for device in filter(None, ["cpu", args.device]):
            here = lambda name: "rows" not in name and (device in name if device != "cpu" else " and " not in name)
            of = lambda who: max(rate for name, rate in best.items() if name.startswith(f"{who}, {what}") and here(name))
            print(f"{what}, {device}: Tidemill / PyTorch {of('Tidemill') / of('PyTorch'):.2f}")


if __name__ == "__main__":
    main()
