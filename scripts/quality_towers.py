#!/usr/bin/env python3
"""One-pass quality of the two-tower model beside the logistic model and beside PyTorch, on the same examples in the same order.

    pip install torch numpy xxhash
    scripts/quality_towers.py kuairand --batches 64,256,512,1024
    scripts/quality_towers.py obd
    scripts/quality_towers.py DIR [DIR..]        directories written by `tidemill generate`, such as -n 3000000 --rate 500 --seed 1

Every learner predicts each example before it learns from it and is judged on all predictions, as scripts/quality.py does. On a generated stream
the share is how much of the way it goes from the best constant's log loss to that of the true probabilities.

The PyTorch program is what one would write there: the architecture, initial values, learning rates, warm-up and clipping of the config, in
batches of `batch.examples`; nn.Embedding(sparse=True) with Adagrad for vectors and, where there is a wide part, for a weight an id and cross;
Adam for the layers. `row-wise` is the same with the rule that keeps one accumulator a row, which torch.optim does not have. What differs: its wide
part learns by batch, and an id that it has not seen begins with its own random vector, where ours answers with its feature's default row.

Behind a log loss stands by how much it is worse than the logistic model's on the same examples, and the standard error of that.

Tidemill runs as shipped (batches end by `batch.period` too) and in the batches that PyTorch gets (`batch.period = "never"`).
"""

import argparse
import json
import pathlib
import sys
import tempfile
import time
import tomllib

import numpy as np
import quality

ROOT = quality.ROOT


class Streamed:
    """Examples as columns: for each feature and cross the ids `[n, width]` (-1 where a bag is shorter) and values, one numbering for all."""

    def __init__(self, files, features, crosses, window):
        clicked = {}
        for click in quality.records(files[1]):
            clicked.setdefault(str(click["id"]), []).append(click["ts"])
        self.names = [feature["name"] for feature in features]
        place = {name: k for k, name in enumerate(self.names)}
        pairs = [[place[name] for name in cross["of"]] for cross in crosses]
        slots, numbers = len(features) + len(pairs), {}
        flat, values, counts, labels, keys, times = [], [], [], [], [], []
        for record in quality.records(files[0]):
            key = str(record["id"])
            parts = [quality.values_of(record, feature) for feature in features]
            for pair in pairs:
                combined = [((), 1.0)]
                for k in pair:
                    combined = [((*key_, v), w * u) for key_, w in combined for v, u in parts[k]]
                parts.append(combined)
            for k, part in enumerate(parts):
                for v, w in part:
                    flat.append(numbers.setdefault((k, v), len(numbers)))
                    values.append(w)
                counts.append(len(part))
            keys.append(key)
            times.append(record["ts"])
            labels.append(any(0 <= at - record["ts"] <= window for at in clicked.get(key, ())))
        self.rows = len(numbers)
        counts = np.array(counts, dtype=np.int32).reshape(-1, slots)
        widths = counts.max(axis=0)
        first = np.concatenate([[0], np.cumsum(widths)])
        self.span = [(int(a), int(b)) for a, b in zip(first, first[1:])]
        ends = np.cumsum(counts.reshape(-1), dtype=np.int64)
        owner = np.repeat(np.arange(counts.size, dtype=np.int64), counts.reshape(-1))
        within = np.arange(len(flat), dtype=np.int64) - (ends - counts.reshape(-1))[owner]
        column = first[owner % slots] + within
        self.ids = np.full((len(counts), first[-1]), -1, dtype=np.int32)
        self.values = np.zeros((len(counts), first[-1]), dtype=np.float32)
        self.ids[owner // slots, column] = flat
        self.values[owner // slots, column] = values
        # By event time; of each id the first counts.
        seen, order = set(), []
        for i in np.argsort(times, kind="stable"):
            if keys[i] not in seen:
                seen.add(keys[i])
                order.append(i)
        self.keys = [keys[i] for i in order]
        self.labels = np.array(labels, dtype=np.float32)[order]
        self.ids, self.values = self.ids[order], self.values[order]


def pytorch(data, features, settings, logistic, prior, batch, wide, row_wise):
    """Predictions of one pass."""
    import torch

    torch.set_num_threads(1)  # small operations: more threads wait for each other, and on a busy machine for ever
    torch.sparse.check_sparse_tensor_invariants.disable()
    torch.manual_seed(1)
    dim, layers, vectors, dense = settings["dim"], settings["layers"], settings["embeddings"], settings["dense"]
    sides = [[k for k, feature in enumerate(features) if feature.get("tower") == side] for side in ("user", "item")]
    # A padding row for short bags, whose value is 0 there.
    table = torch.nn.Embedding(data.rows + 1, dim, sparse=True)
    torch.nn.init.uniform_(table.weight, -vectors["initial"], vectors["initial"])
    weights = torch.nn.Embedding(data.rows + 1, 1, sparse=True)
    torch.nn.init.zeros_(weights.weight)
    bias = torch.nn.Parameter(torch.tensor([float(np.log(prior / (1 - prior)))]))

    def tower(side):
        parts, inputs = [], dim * len(sides[side])
        for i, outputs in enumerate(layers):
            last = i + 1 == len(layers)
            linear = torch.nn.Linear(inputs, outputs)
            bound = ((3 if last else 6) / inputs) ** 0.5
            torch.nn.init.uniform_(linear.weight, -bound, bound)
            torch.nn.init.zeros_(linear.bias)
            if last and side == 1:
                torch.nn.init.zeros_(linear.weight)
            parts += [linear] if last else [linear, torch.nn.ReLU()]
            inputs = outputs
        return torch.nn.Sequential(*parts)

    towers = [tower(0), tower(1)]
    params = [p for t in towers for p in t.parameters()]
    adam = torch.optim.Adam(params, dense["rate"])
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: min(1.0, (step + 1) / max(1, dense["warm_up"])))
    groups = [{"params": [weights.weight, bias], "lr": logistic["a"], "initial_accumulator_value": logistic["n0"]}]
    if not row_wise:
        groups.append({"params": [table.weight], "lr": vectors["rate"], "initial_accumulator_value": vectors["n0"]})
    adagrads = [torch.optim.Adagrad(**group) for group in groups]
    sums = torch.full((data.rows + 1,), vectors["n0"])
    linear = [k for k, feature in enumerate(features) if wide or feature.get("role") == "presentation"]
    linear += range(len(features), len(data.span)) if wide else []
    linear = np.concatenate([np.arange(*data.span[k]) for k in linear]) if linear else np.zeros(0, dtype=np.int64)
    columns = [[torch.arange(*data.span[k]) for k in side] for side in sides]
    lengths = [[len(c) for c in side] for side in columns]
    columns = [torch.cat(side) for side in columns]
    out = np.empty(len(data.labels), dtype=np.float64)
    loss_of = torch.nn.BCEWithLogitsLoss(reduction="sum")
    for start in range(0, len(out), batch):
        part = slice(start, min(start + batch, len(out)))
        ids = data.ids[part]
        ids = torch.from_numpy(np.where(ids < 0, data.rows, ids).astype(np.int64))
        values, labels = torch.from_numpy(data.values[part]), torch.from_numpy(data.labels[part])
        said = []
        for side in range(2):
            every = table(ids[:, columns[side]]) * values[:, columns[side], None]
            pooled = [one.sum(1) for one in every.split(lengths[side], 1)]
            said.append(towers[side](torch.cat(pooled, 1)))
        logit = (said[0] * said[1]).sum(1) + bias
        if len(linear):
            logit = logit + (weights(ids[:, linear])[..., 0] * values[:, linear]).sum(1)
        out[part] = torch.sigmoid(logit.detach().double()).numpy()
        for optimizer in [adam, *adagrads]:
            optimizer.zero_grad()
        table.zero_grad()
        loss_of(logit, labels).backward()
        torch.nn.utils.clip_grad_norm_(params, dense["clip"])
        adam.step()
        schedule.step()
        for optimizer in adagrads:
            optimizer.step()
        if row_wise:
            gradient = table.weight.grad.coalesce()
            rows, g = gradient.indices()[0], gradient.values()
            sums[rows] += (g * g).mean(1)
            with torch.no_grad():
                table.weight[rows] -= vectors["rate"] * g / sums[rows].sqrt()[:, None]
    return out


def compare(source, arguments):
    shipped = source if source in ("kuairand", "obd") else "generated"
    config = pathlib.Path(arguments.config or ROOT / f"configs/{shipped}.toml").resolve()
    settings = tomllib.loads(config.read_text())
    reference = tomllib.loads((ROOT / "configs/reference.toml").read_text())["model"]
    towers = settings["model"].get("two_tower", {})
    towers = {**reference["two_tower"], **towers}
    towers |= {part: {**reference["two_tower"][part], **towers.get(part, {})} for part in ("embeddings", "dense")}
    features, crosses = settings["features"], settings.get("crosses", [])
    logistic = {"a": 0.4 / (len(features) + len(crosses)) ** 0.5, **{k: v for k, v in reference["logistic"].items() if k == "n0"}}
    prior = settings["model"]["logistic"]["prior_ctr"]
    files = quality.event_files(source)
    binary = quality.find_binary(arguments.tidemill)
    if binary is None:
        sys.exit("no tidemill binary in target/release or target/debug: cargo build --release, or name it with --tidemill")
    truth = pathlib.Path(source) / "stats.json"
    stats = json.loads(truth.read_text()) if truth.is_file() else {}
    table = []

    first = {}

    def note(name, scores, seconds):
        """`scores`: probability and label by id, or as they lie."""
        p, y = (np.array(column) for column in zip(*scores.values()))
        row = {"name": name, **quality.judge(p, y), "seconds": round(seconds, 1)}
        loss = -np.log(np.clip(np.where(y > 0.5, p, 1 - p), 1e-7, 1))
        by_id = dict(zip(scores, loss))
        if not first:
            first.update(by_id)
        else:
            # The same examples, so the difference of means has a small error.
            apart = np.array([value - first[key] for key, value in by_id.items()])
            row["worse"], row["error"] = float(apart.mean()), float(apart.std() / len(apart) ** 0.5)
        if "best_logloss" in stats:
            row["share"] = (stats["constant_logloss"] - row["logloss"]) / (stats["constant_logloss"] - stats["best_logloss"])
        table.append(row)
        share = f"  share {row['share']:.3f}" if "share" in row else ""
        worse = f"  {row['worse']:+.6f} ({row['error']:.6f})" if "worse" in row else ""
        print(f"{name:52} logloss {row['logloss']:.5f}{worse:23}  AUC {row['auc']:.4f}{share}  {seconds:5.1f} s", flush=True)

    def ours(name, more):
        began = time.time()
        with tempfile.TemporaryDirectory() as scratch:
            scores, _ = quality.tidemill(binary, config, files, scratch, [*more, *arguments.set])
        note(f"Tidemill, {name}", scores, time.time() - began)

    print(f"{source}: log loss {stats['constant_logloss']:.5f} of the constant, {stats['best_logloss']:.5f} of the truth" if stats else source)
    kind = 'model.kind="two_tower"'
    ours("logistic", [])
    ours("two towers, as shipped", [kind])
    for batch in arguments.batches:
        cut = ['batch.period="never"', f"batch.examples={batch}"]
        ours(f"two towers, batches of {batch}", [kind, *cut])
        if arguments.alone:
            ours(f"towers alone, batches of {batch}", [kind, "model.two_tower.wide=false", *cut])
    if not arguments.no_pytorch:
        began = time.time()
        window = quality.seconds_of(settings["join"]["window"]) * 1000
        data = Streamed(files, features, crosses, window)
        print(f"{len(data.labels)} examples, {data.rows} ids with crosses, encoded for PyTorch in {time.time() - began:.0f} s", flush=True)
        for batch in arguments.batches:
            for wide in (True, False) if arguments.alone else (True,):
                for row_wise in (False, True):
                    what = f"{'two towers' if wide else 'towers alone'}, batches of {batch}{', row-wise' if row_wise else ''}"
                    began = time.time()
                    p = pytorch(data, features, towers, logistic, prior, batch, wide, row_wise)
                    note(f"PyTorch, {what}", dict(zip(data.keys, zip(p, data.labels))), time.time() - began)
    return {"source": str(source), "table": table}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="+", help="kuairand, obd, or directories of generated events")
    parser.add_argument("-c", "--config", help="TOML with the features; default configs/kuairand.toml, obd.toml or generated.toml")
    parser.add_argument("--batches", default=[512], type=lambda s: [int(n) for n in s.split(",")], help="sizes of batches, default 512")
    parser.add_argument("--alone", action="store_true", help="towers without the wide part, too")
    parser.add_argument("--no-pytorch", action="store_true", help="Tidemill only")
    parser.add_argument("--tidemill", help="path of the binary; default target/release, then target/debug")
    parser.add_argument("--set", action="append", default=[], help="a setting for every run of tidemill train, key=value")
    parser.add_argument("--json", help="write the tables to this file too")
    arguments = parser.parse_args()
    tables = [compare(source, arguments) for source in arguments.source]
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(tables, indent=1))


if __name__ == "__main__":
    main()
