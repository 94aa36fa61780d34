"""``python -m benchmarks.gpu.small_calls DEVICE``: calls of every kernel, small, for compute-sanitizer to watch."""

from __future__ import annotations

import itertools
import sys

import torch

from .device import PRECISIONS, Precision

PAIRS, TILES = (70, 33), (1200, 192)  # B x D on either side of where the tiles begin
TRIPLETS = (100, 3000)  # looked through, and sorted
_ALL = (*PRECISIONS, Precision("float16", "float16", "highest"))
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def main(kind: str, shapes: tuple[tuple[int, int], ...] = (PAIRS, TILES), triplets: tuple[int, ...] = TRIPLETS) -> int:
    from triplet_ext import Mining, TripletMarginLoss, Triplets, functional
    from triplet_ext.mining import NEGATIVE_RULES, POSITIVE_RULES

    generator = torch.Generator().manual_seed(1)
    count = 0

    def leaves(number: int, rows: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
        return [torch.randn(rows, width, generator=generator).to(kind, dtype).requires_grad_() for _ in range(number)]

    def done(value: torch.Tensor, inputs: list[torch.Tensor]) -> None:
        nonlocal count
        gradients = torch.autograd.grad(value, inputs)
        assert bool(value.isfinite()) and all(bool(g.isfinite().all()) for g in gradients)
        count += 1

    for (rows, width), precision, distance in itertools.product(shapes, _ALL, ("squared_euclidean", "cosine")):
        with precision():
            dtype = getattr(torch, precision.dtype)
            x, r = leaves(2, rows, width, dtype)
            y = (torch.arange(rows) % (rows // 4)).to(kind)
            done(functional.mined_triplet_loss(x, y, distance=distance), [x])
            other = dict(ref_embeddings=r, ref_labels=y.roll(1), ref_offset=0)
            done(functional.mined_triplet_loss(x, y, distance=distance, **other), [x, r])
    y = (torch.arange(70) % 7).to(kind)  # more positives than a forward can save of rows that are so narrow
    for dtype, rules in itertools.product(_DTYPES, itertools.product(POSITIVE_RULES, NEGATIVE_RULES)):
        for distance, width, soft in (("euclidean", 33, False), ("cosine", 6, True)):
            x, r = leaves(2, 70, width, dtype)
            how = dict(mining=Mining(*rules), distance=distance, soft_margin=soft, swap="all" not in rules[1:])
            done(functional.mined_triplet_loss(x, y, **how), [x])
            done(functional.mined_triplet_loss(x, y, ref_embeddings=r, ref_labels=y.roll(1), **how), [x, r])
    for dtype, distance in itertools.product(_DTYPES, ("euclidean", "cosine")):
        for width in (33, 64):
            three = leaves(3, 50, width, dtype)
            done(functional.triplet_loss(*three, distance=distance, swap=True), three)
            done(TripletMarginLoss(p=3, swap=True)(*three), three)
            for number in triplets:
                index = Triplets(*torch.randint(50, (3, number), generator=generator).to(kind))
                x = three[0]
                done(functional.indexed_triplet_loss(x, index, distance=distance, soft_margin=True), [x])
    print(f"{count} calls")
    return count


if __name__ == "__main__":
    main(sys.argv[1])
