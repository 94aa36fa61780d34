"""Run by test_sanitizers.py against a library built with AddressSanitizer and UBSan: every operator, over sizes around
the widths of vectors, tiles and panels, strided and degenerate input. Only that nothing is reported matters.

    python sanitized.py SEED
"""

import itertools
import sys

import torch

import triplet_ext
from triplet_ext import functional, mining

DISTANCES = ("squared_euclidean", "euclidean", "cosine")
STRATEGIES = [triplet_ext.Mining(*rules) for rules in itertools.product(mining.POSITIVE_RULES, mining.NEGATIVE_RULES)]


def rows(count, width, dtype, kind):
    x = torch.randn(count, width + 3, dtype=torch.float64)
    if kind == "ties":
        x = x.round()
    if kind == "not finite" and count:
        x[:: max(1, count // 3)] = float("nan")
    return x.to(dtype)[:, 1 : width + 1].requires_grad_()  # a slice of a wider tensor


def main():
    torch.manual_seed(int(sys.argv[1]))
    assert triplet_ext.build_info()["cpu"]
    sizes = [(0, 3), (1, 1), (2, 0), (7, 5), (33, 16), (64, 17), (131, 33), (300, 7)]
    kinds = ("plain", "ties", "not finite")
    distances, flags = itertools.cycle(DISTANCES), itertools.cycle((False, False, True, True, False))
    for (count, width), dtype, kind in itertools.product(sizes, (torch.float32, torch.float64, torch.bfloat16), kinds):
        x, memory = rows(count, width, dtype, kind), rows(count + 9, width, dtype, kind)
        labels = torch.randint(max(1, count // 3), (count,))
        memory_labels = torch.randint(max(1, count // 3), (count + 9,))
        for distance, swap in itertools.product(DISTANCES, (False, True)):
            options = {"distance": distance, "swap": swap, "margin": 0.5}
            losses = [
                functional.mined_triplet_loss(x, labels, **options),
                functional.mined_triplet_loss(x, labels, reduction="none", soft_margin=True, **options).sum(),
                functional.mined_triplet_loss(
                    x, labels, ref_embeddings=memory, ref_labels=memory_labels, ref_offset=9, **options
                ),
                functional.triplet_loss(x, memory[:count], memory[9:], **options),
                functional.indexed_triplet_loss(x, triplet_ext.mine(x, labels, distance=distance), **options),
            ]
            for loss in losses:
                torch.autograd.grad(loss, (x, memory), allow_unused=True)
        for number, strategy in itertools.product((2, max(1, count // 3)), STRATEGIES):  # of classes
            distance = next(distances)
            labels, memory_labels = torch.randint(number, (count,)), torch.randint(number, (count + 9,))
            options = {"distance": distance, "mining": strategy, "soft_margin": next(flags), "margin": 0.5}
            losses = [
                functional.mined_triplet_loss(x, labels, swap=strategy.negative != "all", **options),
                functional.mined_triplet_loss(
                    x, labels, ref_embeddings=memory, ref_labels=memory_labels, reduction="none", **options
                ).sum(),
            ]
            for loss in losses:
                torch.autograd.grad(loss, (x, memory), allow_unused=True)
            triplet_ext.mine(x, labels, strategy, distance=distance)
        for p in (1, 2, 3, float("inf")):
            loss = triplet_ext.TripletMarginLoss(p=p, swap=True)(x, memory[:count], memory[9:])
            torch.autograd.grad(loss, (x, memory))
    print("done")


main()
