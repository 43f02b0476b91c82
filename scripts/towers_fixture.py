#!/usr/bin/env python3
"""Writes tests/data/towers/steps.json: what PyTorch makes of some batches of the two-tower model.

    pip install torch
    scripts/towers_fixture.py

Both towers, their gradients, Adam and AdaGrad are PyTorch's, in f64; the logistic part, which learns example by example, is written
out here. The test `steps_of_the_whole_model_equal_pytorch` (src/model/two_tower.rs) starts from the same weights, learns the same batches
and must come to the same logits and weights within 1e-5.
"""

import json
import math
import pathlib
import random

import torch

OUT = pathlib.Path(__file__).resolve().parent.parent / "tests/data/towers/steps.json"
# Feature 0 and 1 (a bag) are of the user, 2 and 3 of the item, 4 of neither.
SIDES = [0, 0, 1, 1, None]
RATE, N0, START = 0.4 / math.sqrt(len(SIDES)), 0.2, 0.0

CASES = [
    {"rule": "element_wise", "dense": "adam", "normalize": False, "layer_norm": False, "activation": "relu"},
    {"rule": "row_wise", "dense": "adam", "normalize": False, "layer_norm": True, "activation": "tanh"},
    {"rule": "row_wise", "dense": "adagrad", "normalize": True, "layer_norm": False, "activation": "tanh"},
    {"rule": "element_wise", "dense": "adagrad", "normalize": True, "layer_norm": True, "activation": "relu"},
]
DIM, LAYERS, CLIP, BATCH = 4, [6, 3], 2.0, 30


def example(chance, known):
    """Slots `(row, value, feature)`, the label and the weight. Some rows come often, some are new."""
    slots = []
    for feature in range(len(SIDES)):
        count = chance.randrange(1, 4) if feature == 1 else 1
        for _ in range(count):
            row = known[feature][min(int(chance.expovariate(0.4)), len(known[feature]) - 1)]
            slots.append((row, 1 / math.sqrt(count) if feature != 3 else chance.uniform(-2, 2), feature))
    return slots, chance.random() < 0.3, chance.choice([1.0, 1.0, 2.5])


class Tower(torch.nn.Module):
    def __init__(self, inputs, case):
        super().__init__()
        self.linears, self.norms = torch.nn.ModuleList(), torch.nn.ModuleList()
        for i, outputs in enumerate(LAYERS):
            self.linears.append(torch.nn.Linear(inputs, outputs))
            inner = i + 1 < len(LAYERS)
            self.norms.append(torch.nn.LayerNorm(outputs) if case["layer_norm"] and inner else torch.nn.Identity())
            inputs = outputs
        self.activation = torch.relu if case["activation"] == "relu" else torch.tanh

    def forward(self, x):
        for i, (linear, norm) in enumerate(zip(self.linears, self.norms)):
            x = norm(linear(x))
            if i + 1 < len(LAYERS):
                x = self.activation(x)
        return x

    def packed(self):
        parts = []
        for linear, norm in zip(self.linears, self.norms):
            parts += [linear.weight.T.reshape(-1), linear.bias]
            if isinstance(norm, torch.nn.LayerNorm):
                parts += [norm.weight, norm.bias]
        return parts


def run(case, seed):
    chance = random.Random(seed)
    torch.manual_seed(seed)
    identity = lambda: chance.getrandbits(64) | 1
    known = [[identity() for _ in range(8)] for _ in SIDES]
    defaults = [identity() for _ in SIDES]
    # Of each feature's rows the last two are new: not in the table at first.
    ids = sorted(row for feature in range(4) for row in known[feature][:-2] + [defaults[feature]])
    table = {row: torch.randn(DIM) * 0.5 for row in ids}
    fresh = {row for feature in range(4) for row in known[feature][-2:]}
    towers = [Tower(2 * DIM, case), Tower(2 * DIM, case)]
    for tower in towers:
        for linear in tower.linears:
            torch.nn.init.normal_(linear.weight, std=0.5)
            torch.nn.init.normal_(linear.bias, std=0.3)
    scale = torch.tensor([1.5], requires_grad=True)
    dense = [p for tower in towers for p in tower.parameters()] + ([scale] if case["normalize"] else [])
    pack = lambda: torch.cat([p.detach().reshape(-1) for tower in towers for p in tower.packed()] + ([scale.detach()] if case["normalize"] else [])).tolist()
    made = {"ids": [f"{row:016x}" for row in ids], "w": torch.cat([table[row] for row in ids]).tolist(), "params": pack()}

    rate, warm = 0.02, 4
    optimizer = torch.optim.Adam(dense, rate) if case["dense"] == "adam" else torch.optim.Adagrad(dense, rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warm))
    rows_rate, rows_n0 = 0.05, 0.01
    sums = {row: torch.zeros(DIM if case["rule"] == "element_wise" else 1) for row in ids}
    logistic, intercept = {}, [START, 0.0]
    batches = []
    for _ in range(5):
        drawn = [example(chance, known) for _ in range(BATCH)]
        # Rows that were there before the batch answer for themselves, others by their feature's default row. New rows begin at 0 here:
        # the fixture sets `initial = 0`.
        there = set(table)
        leaves = {row: table[row].clone().requires_grad_() for row in there}
        inputs = [[], []]
        for slots, _, _ in drawn:
            parts = [[torch.zeros(DIM), torch.zeros(DIM)] for _ in range(2)]
            for row, value, feature in slots:
                if SIDES[feature] is not None:
                    leaf = leaves[row if row in there else defaults[feature]]
                    parts[SIDES[feature]][feature % 2] = parts[SIDES[feature]][feature % 2] + value * leaf
            for side in range(2):
                inputs[side].append(torch.cat(parts[side]))
        inputs = [torch.stack(x) for x in inputs]
        for x in inputs:
            x.retain_grad()
        u, v = (tower(x) for tower, x in zip(towers, inputs))
        products = (u * v).sum(1)
        if case["normalize"]:
            length = lambda a: ((a * a).sum(1) + 1e-4).sqrt()
            products = scale * products / (length(u) * length(v))
        logits, gradients = [], []
        for (slots, positive, weight), product in zip(drawn, products.tolist()):
            seen = {row for row, _, _ in slots if row in logistic}
            entry = lambda row, feature: logistic.get(row if row in seen else defaults[feature], [0.0, 0.0])
            logit = sum(entry(row, feature)[0] * value for row, value, feature in slots) + intercept[0] + product
            d = (1 / (1 + math.exp(-logit)) - positive) * weight
            logits.append(logit)
            gradients.append(d)
            for row, value, feature in slots:
                for target in ([row] if row in seen else [defaults[feature], row]):
                    w, n = logistic.get(target, [0.0, 0.0])
                    n += (d * value) ** 2
                    logistic[target] = [w - RATE * d * value / math.sqrt(N0 + n), n]
            intercept[1] += d * d
            intercept[0] -= RATE * d / math.sqrt(N0 + intercept[1])
        optimizer.zero_grad()
        (products * torch.tensor(gradients)).sum().backward()
        torch.nn.utils.clip_grad_norm_(dense, CLIP)
        optimizer.step()
        schedule.step()
        sparse = {}
        for i, (slots, _, _) in enumerate(drawn):
            for row, value, feature in slots:
                if SIDES[feature] is not None:
                    at = feature % 2 * DIM
                    part = value * inputs[SIDES[feature]].grad[i, at : at + DIM]
                    for target in ([row] if row in there else [defaults[feature], row]):
                        sparse[target] = sparse.get(target, torch.zeros(DIM)) + part
        for row, gradient in sparse.items():
            if row not in table:
                table[row], sums[row] = torch.zeros(DIM), torch.zeros(DIM if case["rule"] == "element_wise" else 1)
                assert row in fresh
            gradient = gradient * min(1.0, CLIP / max(float(gradient.norm()), 1e-30))
            sums[row] = sums[row] + (gradient**2 if case["rule"] == "element_wise" else (gradient**2).mean())
            table[row] = table[row] - rows_rate * gradient / (rows_n0 + sums[row]).sqrt()
        batches.append({
            "examples": [{"slots": [[f"{row:016x}", value, feature] for row, value, feature in slots], "positive": positive, "weight": weight} for slots, positive, weight in drawn],
            "logits": logits,
        })
    after = sorted(table)
    return {
        "settings": {
            "dim": DIM, "layers": LAYERS, "activation": case["activation"], "layer_norm": case["layer_norm"], "normalize": case["normalize"],
            "embeddings": {"rule": case["rule"], "rate": rows_rate, "n0": rows_n0, "clip": CLIP, "initial": 0.0},
            "dense": {"rule": case["dense"], "rate": rate, "examples": BATCH, "warm_up": warm, "clip": CLIP},
        },
        "default_rows": [f"{row:016x}" for row in defaults],
        "before": made,
        "batches": batches,
        "after": {
            "ids": [f"{row:016x}" for row in after],
            "w": torch.cat([table[row] for row in after]).tolist(),
            "params": pack(),
            "logistic_w": [logistic[row][0] for row in sorted(logistic)],
            "intercept": intercept[0],
        },
    }


def rounded(value):
    """Inputs are f32 in Rust: what is drawn here is rounded to what an f32 says, near enough for 1e-5."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, list):
        return [rounded(v) for v in value]
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    return value


def main():
    torch.set_default_dtype(torch.float64)
    cases = [rounded(run(case, seed)) for seed, case in enumerate(CASES, 1)]
    text = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(f"[\n{text}\n]\n")
    print(f"{OUT}: {len(cases)} cases, torch {torch.__version__}")


if __name__ == "__main__":
    main()
