"""Trains an embedding of handwritten digits with batch-hard triplets, and tests it on digits it never saw.

The network sees the digits 0 to 6. It is measured on other scans of these (seen classes) and on the digits 7 to 9
(unseen classes): does the nearest neighbour show the same digit (recall@1), and how pure is the neighbourhood of
the size of the class (MAP@R)? Prints a table and writes pictures; the same seed gives the same numbers.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import sys
import time

import images as data
import torch
from command import Progress, check_margin, device, positive, prepare, share, table, whole
from model import Embedder
from retrieval import project
from torch import Tensor
from training import batches, embed, measure, record, repeatable, steps

import triplet_ext
from triplet_ext.data import PKBatchSampler

EVALUATIONS = 12  # points of the MAP@R curves
STRIPS = 8  # triplets that are drawn


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to train on")
    what.add_argument("--data", type=pathlib.Path, metavar="DIR", help="a folder of images, one sub-folder a class")
    what.add_argument("--size", type=whole(4), metavar="S", help="width and height that its images get (default 32)")
    what.add_argument("--unseen", type=share, metavar="SHARE", help="share of its classes to hold out (default 0.3)")
    what.add_argument(
        "--test-share", type=share, default=0.3, metavar="SHARE", help="of the seen classes (default 0.3)"
    )
    how = parser.add_argument_group("how to train")
    how.add_argument("--epochs", type=whole(1), metavar="E", help="passes over the data (default 180, --data: 30)")
    how.add_argument("--quick", action="store_true", help="a tenth of the epochs, to see it run")
    how.add_argument("--classes", type=whole(2), metavar="P", help="classes in a batch (default: all, at most 16)")
    how.add_argument("--samples", type=whole(2), default=8, metavar="K", help="samples of each of them (default 8)")
    how.add_argument("--margin", type=float, default=1.0, metavar="M", help="of the loss (default 1)")
    how.add_argument(
        "--distance",
        choices=("euclidean", "squared_euclidean", "cosine"),
        default="euclidean",
        help="default euclidean",
    )
    how.add_argument("--soft-margin", action="store_true", help="log(1 + exp(t)) in place of max(0, t)")
    how.add_argument("--dimensions", type=whole(2), default=256, metavar="D", help="of the embedding (default 256)")
    how.add_argument("--learning-rate", type=positive, default=1e-3, metavar="R", help="of Adam (default 0.001)")
    how.add_argument(
        "--turn",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="in every batch, each class is turned by a quarter or mirrored at random, all its images alike: seven"
        " digits make 56 different shapes, and what is learnt carries over to other shapes (default: yes)",
    )
    run = parser.add_argument_group("the run")
    run.add_argument("--seed", type=whole(0), default=0, metavar="N", help="default 0")
    run.add_argument(
        "--threads",
        type=whole(1),
        metavar="N",
        help="default 1, as the scans are too small for more, and with --data torch's choice; the digits give the"
        " same numbers for every N",
    )
    run.add_argument("--device", type=device, default="cpu", help="default cpu")
    run.add_argument(
        "--output", type=pathlib.Path, default="demo-output", metavar="DIR", help="for pictures (default demo-output)"
    )
    options = parser.parse_args(argv)
    if options.data is None and (options.size or options.unseen):
        parser.error("--size and --unseen go with --data")
    check_margin(parser, "--margin", options.margin)
    options.size = options.size or 32
    options.unseen = options.unseen or 0.3
    options.epochs = options.epochs or (30 if options.data else 180)
    options.threads = options.threads or (torch.get_num_threads() if options.data else 1)
    if options.quick:
        options.epochs = max(1, options.epochs // 10)
    return options


def train(options, images, split, network, curves):
    """Trains in place; returns images, labels and embeddings of the last batch."""
    sampler = PKBatchSampler(images.labels[split.train], options.classes, options.samples, seed=options.seed)
    loss = triplet_ext.TripletLoss(options.margin, distance=options.distance, soft_margin=options.soft_margin)
    total = options.epochs * len(sampler)
    evaluated = {total * i // EVALUATIONS for i in range(1, EVALUATIONS + 1)}

    example = torch.empty(options.classes * options.samples, options.dimensions, device=options.device)
    print(triplet_ext.explain(example) + "\n", flush=True)
    seen = batches(images, split.train, sampler, epochs=options.epochs, turn=options.turn)
    training = steps(network, loss, seen, total, learning_rate=options.learning_rate)
    step = record(training, loss, curves, lambda: measure(network, images, split), evaluated, Progress(total))
    return step.images.cpu(), step.labels.cpu(), step.embeddings.cpu()


def hardest(embeddings: Tensor, labels: Tensor, options) -> tuple[list[tuple[int, int, int]], Tensor, Tensor]:
    """The mined triplets of largest d_ap - d_an, in that order, none with the anchor and positive of another.

    Returns their rows (anchor, positive, negative), their distances [T, 2] and their losses [T].
    """
    functional, distance = triplet_ext.functional, options.distance
    chosen = triplet_ext.mine(embeddings, labels, distance=distance)
    form = dict(margin=options.margin, distance=distance, soft_margin=options.soft_margin, reduction="none")
    losses = functional.indexed_triplet_loss(embeddings, chosen, **form)
    a, p, n = (embeddings[index] for index in chosen)
    alone = dict(margin=0.0, distance=distance, reduction="none")  # with d(a, a) = 0: d(a, other)
    distances = torch.stack([functional.triplet_loss(a, other, a, **alone) for other in (p, n)], 1)
    pairs, shown = set(), []
    for t in (distances[:, 0] - distances[:, 1]).argsort(descending=True, stable=True).tolist():
        pair = frozenset((int(chosen.anchor[t]), int(chosen.positive[t])))
        if pair not in pairs and len(shown) < STRIPS:
            pairs.add(pair)
            shown.append(t)
    rows = [(a, p, n) for a, p, n in torch.stack(chosen, 1)[shown].tolist()]
    return rows, distances[shown], losses[shown]


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    read = (lambda: data.folder(options.data, options.size)) if options.data else data.digits
    images = prepare(options.output, read)
    if images is None:
        return 1
    import figures

    began = time.perf_counter()
    repeatable(options.seed, options.threads, small=not options.data)
    if options.data:
        unseen = data.hold_out(len(images.names), options.unseen, options.seed)
    else:
        unseen = torch.tensor(data.UNSEEN_DIGITS)
    split = data.split(images.labels, unseen, options.test_share, options.seed)
    options.classes = min(options.classes or 16, len(images.names) - len(unseen))
    print(data.describe(images, split, unseen) + "\n")
    images = images._replace(pixels=images.pixels.to(options.device))

    network = Embedder(images.pixels.shape[1], images.pixels.shape[2], options.dimensions).to(options.device)
    scores = {"raw pixels": measure(torch.nn.Flatten(), images, split)}
    tested = torch.cat((split.seen, split.unseen))
    scores["untrained network"] = measure(network, images, split)
    before = project(embed(network, images.pixels[tested]))
    curves = figures.Curves([], [], [], [], [0], [], [])
    for part in ("seen", "unseen"):
        getattr(curves, part).append(scores["untrained network"][part])

    try:
        last = train(options, images, split, network, curves)
    except FloatingPointError as error:
        print(f"\nStopped: {error}; try a smaller --learning-rate.", file=sys.stderr)
        return 1
    scores["trained network"] = {"seen": curves.seen[-1], "unseen": curves.unseen[-1]}
    after = project(embed(network, images.pixels[tested]))
    print("\n" + table(scores, split) + "\n")

    panels = [(f"before training: {_title(scores['untrained network'])}", before)]
    panels += [(f"after training: {_title(scores['trained network'])}", after)]
    pictures = {
        "embedding.png": figures.embedding(panels, images.labels[tested], unseen, images.names),
        "training.png": figures.training(curves, scores["raw pixels"], options.distance),
        "hardest.png": figures.triplets(*last[:2], *hardest(last[2], last[1], options), images.names),
    }
    for name, picture in pictures.items():
        figures.save(picture, options.output / name)
    results = {"scores": scores, "curves": curves._asdict()}
    text = json.dumps(results).replace("NaN", "null")  # of a part without images
    (options.output / "results.json").write_text(text + "\n")
    print(f"{', '.join([*pictures, 'results.json'])} are in {options.output} ({time.perf_counter() - began:.0f} s)")
    return 0


def _title(scores: dict[str, tuple[float, float]]) -> str:
    quality = ", ".join(f"{part} {mapr:.2f}" for part, (_, mapr) in scores.items() if math.isfinite(mapr))
    return f"MAP@R {quality}"


if __name__ == "__main__":
    sys.exit(main())
