"""Trains the network of digits.py with every named mining strategy and several margins, and compares.

Every training starts from the same weights and sees the same batches, distorted alike. Prints a table and draws it:
recall@1 and MAP@R on other scans of the digits 0 to 6 (seen classes) and on the digits 7 to 9 (unseen classes); the
share of the triplets with a loss above 0, mean of the last epoch; the seconds of a step, the network's included,
median. The same seed gives the same numbers but for the seconds.
"""

from __future__ import annotations

import argparse
import copy
import json
import pathlib
import statistics
import sys
import time

import images as data
import torch
from command import Progress, check_margin, prepare, table, whole
from model import Embedder
from training import active, batches, measure, repeatable, steps

import triplet_ext
from triplet_ext.data import PKBatchSampler
from triplet_ext.mining import PRESETS

# As in digits.py.
SAMPLES = 8  # of each class in a batch
DIMENSIONS = 256  # of the embedding
TEST_SHARE = 0.3  # of the seen classes
# Small, middling and large beside the gaps between distances here: the network gives every dimension the variance 1,
# and two images are about 20 apart.
MARGINS = {"euclidean": (0.2, 1.0, 5.0), "squared_euclidean": (5.0, 30.0, 150.0), "cosine": (0.02, 0.1, 0.5)}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=whole(1), default=60, metavar="E", help="of each training (default 60)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the epochs, to see it run")
    parser.add_argument("--distance", choices=tuple(MARGINS), default="euclidean", help="default euclidean")
    defaults = ", ".join(f"{distance} {' '.join(f'{m:g}' for m in margins)}" for distance, margins in MARGINS.items())
    parser.add_argument("--margins", type=float, nargs="+", metavar="M", help=f"default: {defaults}")
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="default 0")
    parser.add_argument(
        "--threads",
        type=whole(1),
        default=1,
        metavar="N",
        help="default 1, as the scans are too small for more; the numbers are the same for every N",
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default="demo-output",
        metavar="DIR",
        help="for the picture (default demo-output)",
    )
    options = parser.parse_args(argv)
    margins = options.margins or MARGINS[options.distance]
    options.margins = sorted({float(f"{margin:g}") for margin in margins})  # what differs has rows of different names
    for margin in options.margins:
        check_margin(parser, "--margins", margin)
    if options.quick:
        options.epochs = max(1, options.epochs // 10)
    return options


def row(mining: str, margin: float) -> str:
    """The row's name in the table."""
    return f"{mining:14}{margin:>6g}"


def trainings(options, images, split, untrained):
    """One after another: the row's name, the trained network, the active share and the seconds of a step."""
    labels = images.labels[split.train]
    sampler = PKBatchSampler(labels, len(labels.unique()), SAMPLES, seed=options.seed)
    total = options.epochs * len(sampler)
    print(triplet_ext.explain(torch.empty(sampler.classes_per_batch * SAMPLES, DIMENSIONS)) + "\n", flush=True)
    kinds = [(mining, margin) for mining in PRESETS for margin in options.margins]
    progress = Progress(total * len(kinds))
    for number, (mining, margin) in enumerate(kinds):
        name, network = row(mining, margin), copy.deepcopy(untrained)
        loss = triplet_ext.TripletLoss(margin, distance=options.distance, mining=mining)
        sampler.set_epoch(0)
        shares, seconds = [], []
        began = time.perf_counter()
        try:
            seen = batches(images, split.train, sampler, epochs=options.epochs)
            for step in steps(network, loss, seen, total):
                seconds.append(time.perf_counter() - began)
                shares.append(active(loss))
                text = f"{name}  loss {step.loss:.3f}  active {shares[-1]:4.0%}"
                progress.show(number * total + step.number, text)
                began = time.perf_counter()
        except FloatingPointError as error:
            raise FloatingPointError(f"{mining} with margin {margin:g}: {error}") from None
        yield name, network, statistics.mean(shares[-len(sampler) :]), statistics.median(seconds)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    images = prepare(options.output, data.digits)
    if images is None:
        return 1
    import figures

    began = time.perf_counter()
    repeatable(options.seed, options.threads, small=True)
    unseen = torch.tensor(data.UNSEEN_DIGITS)
    split = data.split(images.labels, unseen, TEST_SHARE, options.seed)
    print(data.describe(images, split, unseen) + "\n")
    untrained = Embedder(images.pixels.shape[1], images.pixels.shape[2], DIMENSIONS)
    scores = {"raw pixels": measure(torch.nn.Flatten(), images, split)}
    scores["untrained network"] = measure(untrained, images, split)
    shares, seconds = {}, {}
    try:
        for name, network, share, median in trainings(options, images, split, untrained):
            scores[name], shares[name], seconds[name] = measure(network, images, split), share, median
    except FloatingPointError as error:
        print(f"\nStopped: {error}.", file=sys.stderr)
        return 1
    print("\n" + table(scores, split, f"{'mining':14}{'margin':>6}", {"active": shares, "s/step": seconds}) + "\n")

    columns = {
        f"{score}, {part} classes": {name: of_row[part][index] for name, of_row in scores.items()}
        for index, score in enumerate(("recall@1", "MAP@R"))
        for part in ("seen", "unseen")
    }
    columns |= {"active triplets": shares, "seconds a step": seconds}
    strategies = {mining: [row(mining, margin) for margin in options.margins] for mining in PRESETS}
    figures.save(figures.comparison(columns, strategies, options.margins), options.output / "comparison.png")
    results = {"scores": scores, "active": shares, "seconds": seconds}
    (options.output / "comparison.json").write_text(json.dumps(results) + "\n")
    print(f"comparison.png, comparison.json are in {options.output} ({time.perf_counter() - began:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
