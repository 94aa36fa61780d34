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
import shutil
import sys
import time

import images as data
import torch
from model import Embedder, augment
from retrieval import project, retrieval
from torch import Tensor

import triplet_ext
from triplet_ext.data import PKBatchSampler

EVALUATIONS = 12  # points of the MAP@R curves
STRIPS = 8  # triplets that are drawn
DISTRIBUTIONS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "PIL": "pillow"}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to train on")
    what.add_argument("--data", type=pathlib.Path, metavar="DIR", help="a folder of images, one sub-folder a class")
    what.add_argument("--size", type=_whole(4), metavar="S", help="width and height that its images get (default 32)")
    what.add_argument("--unseen", type=_share, metavar="SHARE", help="share of its classes to hold out (default 0.3)")
    what.add_argument(
        "--test-share", type=_share, default=0.3, metavar="SHARE", help="of the seen classes (default 0.3)"
    )
    how = parser.add_argument_group("how to train")
    how.add_argument("--epochs", type=_whole(1), metavar="E", help="passes over the data (default 180, --data: 30)")
    how.add_argument("--quick", action="store_true", help="a tenth of the epochs, to see it run")
    how.add_argument("--classes", type=_whole(2), metavar="P", help="classes in a batch (default: all, at most 16)")
    how.add_argument("--samples", type=_whole(2), default=8, metavar="K", help="samples of each of them (default 8)")
    how.add_argument("--margin", type=float, default=1.0, metavar="M", help="of the loss (default 1)")
    how.add_argument(
        "--distance",
        choices=("euclidean", "squared_euclidean", "cosine"),
        default="euclidean",
        help="default euclidean",
    )
    how.add_argument("--soft-margin", action="store_true", help="log(1 + exp(t)) in place of max(0, t)")
    how.add_argument("--dimensions", type=_whole(2), default=256, metavar="D", help="of the embedding (default 256)")
    how.add_argument("--learning-rate", type=_positive, default=1e-3, metavar="R", help="of Adam (default 0.001)")
    how.add_argument(
        "--turn",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="in every batch, each class is turned by a quarter or mirrored at random, all its images alike: seven"
        " digits make 56 different shapes, and what is learnt carries over to other shapes (default: yes)",
    )
    run = parser.add_argument_group("the run")
    run.add_argument("--seed", type=_whole(0), default=0, metavar="N", help="default 0")
    run.add_argument(
        "--threads",
        type=_whole(1),
        metavar="N",
        help="default 1, as the scans are too small for more, and with --data torch's choice; the digits give the"
        " same numbers for every N",
    )
    run.add_argument("--device", type=_device, default="cpu", help="default cpu")
    run.add_argument(
        "--output", type=pathlib.Path, default="demo-output", metavar="DIR", help="for pictures (default demo-output)"
    )
    options = parser.parse_args(argv)
    if options.data is None and (options.size or options.unseen):
        parser.error("--size and --unseen go with --data")
    try:
        triplet_ext.TripletLoss(options.margin)
    except ValueError as error:
        parser.error(f"argument --margin: {error}")
    options.size = options.size or 32
    options.unseen = options.unseen or 0.3
    options.epochs = options.epochs or (30 if options.data else 180)
    options.threads = options.threads or (torch.get_num_threads() if options.data else 1)
    if options.quick:
        options.epochs = max(1, options.epochs // 10)
    return options


def _whole(least: int):
    def number(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
        return int(text)

    return number


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text!r}")
    return value


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def _device(text: str) -> torch.device:
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"cannot use {text!r}: {str(error).splitlines()[0]}") from None


class Progress:
    """One line that is rewritten on a terminal; elsewhere, a line for each tenth of the way."""

    def __init__(self, total: int) -> None:
        self.total, self.start, self.shown = total, time.perf_counter(), -math.inf
        self.terminal = sys.stderr.isatty()

    def show(self, step: int, text: str) -> None:
        """After ``step`` steps."""
        now, done = time.perf_counter(), step == self.total
        left = (now - self.start) * (self.total - step) / step
        text = f"{step:{len(str(self.total))}}/{self.total} {text}  {now - self.start:4.0f} s, {left:3.0f} s left"
        if self.terminal:
            if now - self.shown < 0.1 and not done:
                return
            room = shutil.get_terminal_size().columns - 1
            bar = min(24, room - len(text) - 3)
            if bar >= 4:
                full = bar * step // self.total
                text = f"[{'#' * full}{'.' * (bar - full)}] {text}"
            print(f"\r\033[K{text[:room]}", end="\n" if done else "", file=sys.stderr, flush=True)
            self.shown = now
        elif done or 10 * step // self.total > 10 * (step - 1) // self.total:
            print(text, file=sys.stderr, flush=True)


def embed(network: torch.nn.Module, images: Tensor) -> Tensor:
    """[N, D] on the CPU, by the network as it is used, not trained."""
    was_training = network.training
    network.eval()
    with torch.inference_mode():
        rows = torch.cat([network(part) for part in images.split(512)]).cpu()
    network.train(was_training)
    return rows


def train(options, images, split, network, measure, curves):
    """Trains in place; returns images, labels and embeddings of the last batch."""
    pixels, labels = images.pixels.to(options.device), images.labels.to(options.device)
    sampler = PKBatchSampler(images.labels[split.train], options.classes, options.samples, seed=options.seed)
    loss = triplet_ext.TripletLoss(options.margin, distance=options.distance, soft_margin=options.soft_margin)
    steps = options.epochs * len(sampler)
    optimiser = torch.optim.Adam(network.parameters(), lr=options.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = torch.Generator().manual_seed(options.seed)
    evaluated = {steps * i // EVALUATIONS for i in range(1, EVALUATIONS + 1)}

    example = torch.empty(options.classes * options.samples, options.dimensions, device=options.device)
    print(triplet_ext.explain(example) + "\n", flush=True)
    progress = Progress(steps)
    network.train()
    for step in range(1, steps + 1):
        if (step - 1) % len(sampler) == 0:
            batches = iter(sampler)  # the next epoch
        batch = split.train[next(batches)].to(options.device)
        quarters = None
        if options.turn:
            quarters = torch.randint(8, (options.classes,), generator=generator).repeat_interleave(options.samples)
        seen = augment(pixels[batch], generator, quarters)
        embeddings = network(seen)
        value = loss(embeddings, labels[batch])
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        schedule.step()

        stats = loss.stats
        curves.loss.append(float(value.detach()))
        if not math.isfinite(curves.loss[-1]):
            raise FloatingPointError(f"the loss of step {step} is {curves.loss[-1]}; try a smaller --learning-rate")
        curves.active.append(float(stats.active) / max(1, int(stats.triplets)))
        curves.positive.append(float(stats.positive_distance))
        curves.negative.append(float(stats.negative_distance))
        if step in evaluated:
            scores = measure(lambda part: embed(network, pixels[part]))
            curves.at.append(step)
            curves.seen.append(scores["seen"])
            curves.unseen.append(scores["unseen"])
        progress.show(
            step,
            f"loss {curves.loss[-1]:.3f}  active {curves.active[-1]:4.0%}"
            f"  d_ap {curves.positive[-1]:.2f}  d_an {curves.negative[-1]:.2f}",
        )
    return seen.cpu(), labels[batch].cpu(), embeddings.detach().cpu()


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


def table(scores: dict[str, dict[str, tuple[float, float]]], parts: dict[str, str]) -> str:
    def cell(value: float) -> str:
        return f"{value:>10.4f}" if math.isfinite(value) else f"{'-':>10}"

    lines = [" " * 20 + "".join(f"{parts[part]:>24}" for part in parts)]
    lines.append(" " * 20 + (" " * 4 + f"{'recall@1':>10}{'MAP@R':>10}") * len(parts))
    for name, row in scores.items():
        lines.append(f"{name:20}" + "".join(" " * 4 + "".join(map(cell, row[part])) for part in parts))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"Nowhere to write to: {error}.", file=sys.stderr)
        return 1
    try:
        import figures

        images = data.folder(options.data, options.size) if options.data else data.digits()
    except ImportError as error:
        missing = DISTRIBUTIONS.get((error.name or "").split(".")[0])
        if missing is None:
            raise
        print(f"The demo needs {missing}: pip install 'triplet_ext[demo]'", file=sys.stderr)
        return 1
    except (data.Unusable, OSError) as why:
        print(f"Nothing to train on: {why}.", file=sys.stderr)
        return 1
    began = time.perf_counter()
    torch.set_num_threads(options.threads)
    if not options.data:
        # The convolutions of oneDNN sum in an order that depends on the number of threads. What stands in for them
        # does so for larger images only, and takes longer.
        torch.backends.mkldnn.enabled = False
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.manual_seed(options.seed)

    if options.data:
        unseen = data.hold_out(len(images.names), options.unseen, options.seed)
    else:
        unseen = torch.tensor([7, 8, 9])
    split = data.split(images.labels, unseen, options.test_share, options.seed)
    seen_classes = len(images.names) - len(unseen)
    options.classes = min(options.classes or 16, seen_classes)
    print(
        f"{len(images.labels)} images of {len(images.names)} classes: {len(split.train)} of {seen_classes} classes to"
        f" train on, {len(split.seen)} others of these to test (seen),\n"
        f"{len(split.unseen)} of {len(unseen)} other classes (unseen: {_listed([images.names[i] for i in unseen])})\n"
    )

    def measure(embedding) -> dict[str, tuple[float, float]]:
        parts = {"seen": split.seen, "unseen": split.unseen}
        return {name: retrieval(embedding(part), images.labels[part]) for name, part in parts.items()}

    network = Embedder(images.pixels.shape[1], images.pixels.shape[2], options.dimensions).to(options.device)
    scores = {"raw pixels": measure(lambda part: images.pixels[part].flatten(1))}
    tested = torch.cat((split.seen, split.unseen))
    test_images = images.pixels.to(options.device)
    scores["untrained network"] = measure(lambda part: embed(network, test_images[part]))
    before = project(embed(network, test_images[tested]))
    curves = figures.Curves([], [], [], [], [0], [], [])
    for part in ("seen", "unseen"):
        getattr(curves, part).append(scores["untrained network"][part])

    try:
        last = train(options, images, split, network, measure, curves)
    except FloatingPointError as error:
        print(f"\nStopped: {error}.", file=sys.stderr)
        return 1
    scores["trained network"] = {"seen": curves.seen[-1], "unseen": curves.unseen[-1]}
    after = project(embed(network, test_images[tested]))
    parts = {"seen": f"seen, {len(split.seen)} images", "unseen": f"unseen, {len(split.unseen)} images"}
    print("\n" + table(scores, parts) + "\n")

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


def _listed(names: list[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


if __name__ == "__main__":
    sys.exit(main())
