"""Trains the network of digits.py on several processes, with triplets mined over the batches of all of them.

    torchrun --nproc-per-node 2 examples/distributed.py            # DistributedDataParallel
    torchrun --nproc-per-node 2 examples/distributed.py --fsdp     # FSDP2: parameters sharded, too
    python examples/distributed.py                                 # one process
    torchrun --nproc-per-node 2 examples/distributed.py --bank 4096  # without and with a memory bank

The batch of a step is the batches of all processes, in the order of their ranks. The processes talk by NCCL where each
has a GPU of its own, else by gloo. Prints a table and draws a picture; the same seed and number of processes give the
same numbers.

--bank trains the network twice, from the same weights on the same batches, the second time with a
triplet_ext.MemoryBank: the last rows of all processes, the same on each of them, to mine from as well.

--check trains the same network in one process, with the whole batch, and compares the parameters. Batch norm is not
synchronised: every process normalises its own batch, and so does that one process with each part of the whole batch.
The check computes in float64 and descends by SGD: to Adam the scale of a gradient does not matter, and of one that is
0 but for rounding it makes a step of any size.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator

import images as data
import torch
import torch.distributed as dist
from command import Progress, check_margin, prepare, table, whole
from model import Embedder
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training import Step, batches, measure, record, repeatable, steps

import triplet_ext
from triplet_ext.data import PKBatchSampler
from triplet_ext.mining import PRESETS

# As in digits.py.
SAMPLES = 8  # of each class in a process's batch
DIMENSIONS = 256  # of the embedding
TEST_SHARE = 0.3  # of the seen classes
EVALUATIONS = 12  # points of the MAP@R curves
# The share of the steps in which a bank is filled only. At first the network changes fast, and what it made of an image
# some steps ago is not what it would make of it now.
WARM_UP = 0.25
EQUAL = 1e-11  # of a parameter's largest value: what --check takes for rounding in float64


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fsdp", action="store_true", help="FSDP2 in place of DistributedDataParallel")
    parser.add_argument(
        "--check",
        type=whole(1),
        nargs="?",
        const=20,
        metavar="STEPS",
        help="before the training: are the parameters after so many steps (default 20) those of one process with the"
        " whole batch? If not, exit status 1",
    )
    parser.add_argument(
        "--bank", type=whole(1), metavar="N", help="train a second time, with a memory bank of N rows; compare"
    )
    parser.add_argument("--epochs", type=whole(1), default=180, metavar="E", help="passes over the data (default 180)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the epochs, to see it run")
    parser.add_argument(
        "--samples", type=whole(1), default=SAMPLES, metavar="K", help="of a class in a process's batch (default 8)"
    )
    parser.add_argument("--mining", choices=tuple(PRESETS), default="batch_hard", help="default batch_hard")
    parser.add_argument("--margin", type=float, default=1.0, metavar="M", help="of the loss (default 1)")
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="default 0")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default cuda where each process has a GPU, else cpu")
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default="demo-output",
        metavar="DIR",
        help="for the picture (default demo-output)",
    )
    options = parser.parse_args(argv)
    check_margin(parser, "--margin", options.margin)
    if options.bank and options.check == 1:
        parser.error("argument --check: takes at least 2 steps with --bank, which is empty in the first, got 1")
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if options.device == "cuda" and gpus < processes:
        parser.error(f"argument --device: cuda takes a GPU for each of the {processes} processes here, got {gpus}")
    options.device = options.device or ("cuda" if gpus >= processes else "cpu")
    if options.quick:
        options.epochs = max(1, options.epochs // 10)
    return options


def join(kind: str) -> torch.device:
    """Enters the process group that torchrun has prepared, or one of this process alone; returns its device."""
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if kind == "cuda" else "gloo"
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def spread(network: nn.Module, fsdp: bool, device: torch.device) -> nn.Module:
    """The network as all processes train it together. Each made it after the same seed, hence with equal weights."""
    if not fsdp:
        return DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in network:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            fully_shard(layer, mesh=mesh)
    return fully_shard(network, mesh=mesh)


def gathered(network: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, whole. Every process has to call this."""
    return get_model_state_dict(network, options=StateDictOptions(full_state_dict=True))


def sampler_of(rank: int, options, labels: Tensor) -> PKBatchSampler:
    classes = len(labels.unique())
    processes = dist.get_world_size()
    return PKBatchSampler(labels, classes, options.samples, seed=options.seed, num_replicas=processes, rank=rank)


def criterion(options, process_group=None) -> triplet_ext.TripletLoss:
    return triplet_ext.TripletLoss(
        options.margin,
        distance="euclidean",
        mining=options.mining,
        process_group=process_group,
        equal_batches=process_group is not None,  # each process has P x K rows in every step
    )


def new_bank(options, device: torch.device, dtype: torch.dtype = torch.float32) -> triplet_ext.MemoryBank | None:
    """An empty one; None without --bank."""
    return triplet_ext.MemoryBank(options.bank, DIMENSIONS, dtype=dtype).to(device) if options.bank else None


def batches_of(rank: int, epochs: int, options, images, split) -> Iterator[tuple[Tensor, ...]]:
    """Images, labels and ids. The labels tell the orientations apart: rows meet those of other processes and of the
    bank, whose classes may be turned otherwise."""
    sampler = sampler_of(rank, options, images.labels[split.train])
    return batches(images, split.train, sampler, epochs=epochs, apart=True)


def training(network, loss, bank, process_group, batches, total, **form) -> Iterator[Step]:
    """The steps of a training. If there is a bank, each batch goes into it after its step, and after the warm-up the
    loss mines from it as well."""
    first = int(WARM_UP * total) if bank is not None else total  # steps, in which the loss does not see the bank
    number = itertools.count()

    def mined(embeddings, labels, ids):
        if next(number) < first:
            return loss(embeddings, labels)
        return loss(embeddings, labels, memory=bank, ids=ids)

    for step in steps(network, mined, batches, total, **form):
        if bank is not None:
            # Every rank gets the rows of all, in the same order: the banks stay equal, and so do the losses.
            bank.enqueue(step.embeddings, step.labels, step.ids, process_group=process_group, equal_batches=True)
        yield step


class InTurn(nn.Module):
    """The network on the whole batch, the part of each process by itself, as batch norm sees it there."""

    def __init__(self, network: nn.Module, parts: int) -> None:
        super().__init__()
        self.network, self.parts = network, parts

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.network(part) for part in x.chunk(self.parts)])


def check(options, images, split, untrained: nn.Module) -> bool:
    """Are the parameters after some steps those of one process with the whole batch? The same answer everywhere."""
    processes, rank = dist.get_world_size(), dist.get_rank()

    def few(rank):
        seen = itertools.islice(batches_of(rank, options.check, options, images, split), options.check)
        return ((x.double(), *more) for x, *more in seen)

    def train(network, batches, process_group=None):
        loss, bank = criterion(options, process_group), new_bank(options, images.pixels.device, torch.float64)
        for _ in training(network, loss, bank, process_group, batches, options.check, kind=torch.optim.SGD):
            pass

    together = spread(copy.deepcopy(untrained).double(), options.fsdp, images.pixels.device)
    train(together, few(rank), dist.group.WORLD)
    found = gathered(together)
    apart = torch.zeros((), dtype=torch.float64, device=images.pixels.device)
    if rank == 0:
        alone = copy.deepcopy(untrained).double()
        parts = zip(*(few(rank) for rank in range(processes)))
        whole_batches = (tuple(map(torch.cat, zip(*batch))) for batch in parts)
        train(InTurn(alone, processes), whole_batches)
        for name, parameter in alone.named_parameters():
            wanted = parameter.detach()
            apart = torch.maximum(apart, (found[name] - wanted).abs().max() / wanted.abs().max())
    dist.broadcast(apart, 0)
    equal = bool(apart <= EQUAL)  # NaN is not
    if rank == 0:
        how = f"{processes} processes under {'FSDP2' if options.fsdp else 'DistributedDataParallel'}"
        bank = f" with a bank of {options.bank} rows" if options.bank else ""
        print(
            f"check{bank}: after {options.check} steps in float64, the parameters of {how}\n"
            f"and of one with the whole batch are {'equal' if equal else 'NOT EQUAL'}: they differ by"
            f" {float(apart):.1e} of the largest value, {EQUAL:.0e} may be rounding\n",
            flush=True,
        )
    return equal


def train(options, images, split, untrained: nn.Module, curves, bank) -> dict[str, Tensor]:
    """Trains a copy of the network; returns its parameters and buffers."""
    rank, world = dist.get_rank(), dist.group.WORLD
    total = options.epochs * len(sampler_of(rank, options, images.labels[split.train]))
    evaluated = {total * i // EVALUATIONS for i in range(1, EVALUATIONS + 1)}
    network = spread(copy.deepcopy(untrained), options.fsdp, images.pixels.device)
    loss = criterion(options, world)

    def score():
        """Measured by one process, while the others wait in the next step."""
        state = gathered(network)
        return measure(loaded(untrained, state), images, split) if rank == 0 else dict.fromkeys(("seen", "unseen"))

    seen = batches_of(rank, options.epochs, options, images, split)
    progress = Progress(total) if rank == 0 else None
    record(training(network, loss, bank, world, seen, total), loss, curves, score, evaluated, progress)
    return gathered(network)


def loaded(untrained: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    network = copy.deepcopy(untrained)
    network.load_state_dict(state)
    return network


def run(options, images, device: torch.device) -> int:
    import figures

    first, processes = dist.get_rank() == 0, dist.get_world_size()
    began = time.perf_counter()
    repeatable(options.seed, 1, small=True)
    unseen = torch.tensor(data.UNSEEN_DIGITS)
    split = data.split(images.labels, unseen, TEST_SHARE, options.seed)
    images = images._replace(pixels=images.pixels.to(device))
    untrained = Embedder(images.pixels.shape[1], images.pixels.shape[2], DIMENSIONS).to(device)
    rows = len(images.labels[split.train].unique()) * options.samples
    if first:
        print(data.describe(images, split, unseen))
        count = f"{processes} process{'es' if processes > 1 else ''}"
        print(f"{count} ({dist.get_backend()}, {device.type}), {rows} rows of a batch on each\n", flush=True)

    scores = {
        "raw pixels": measure(nn.Flatten(), images, split),
        "untrained network": measure(untrained, images, split),
    }
    name = f"{'FSDP2' if options.fsdp else 'DDP'}, {processes} x {rows} rows"
    banks = {name: None}
    if options.bank:
        banks[f"{name}, bank of {options.bank}"] = new_bank(options, device)
    before, curves, states = scores["untrained network"], {}, {}
    try:
        if options.check and not check(options, images, split, untrained):
            return 1
        for name, bank in banks.items():
            curves[name] = figures.Curves([], [], [], [], [0], [before["seen"]], [before["unseen"]])
            states[name] = train(options, images, split, untrained, curves[name], bank)
    except FloatingPointError as error:  # every process has the same loss
        if first:
            print(f"\nStopped: {error}.", file=sys.stderr)
        return 1
    if first:
        scores |= {name: measure(loaded(untrained, state), images, split) for name, state in states.items()}
        print("\n" + table(scores, split) + "\n")
        write(options.output, scores, *curves.values())
        print(f"distributed.png, distributed.json are in {options.output} ({time.perf_counter() - began:.0f} s)")
    return 0


def write(output: pathlib.Path, scores, curves, with_bank=None) -> None:
    """The picture, and all numbers."""
    import figures

    other = None if with_bank is None else ("with the bank", with_bank)
    picture = figures.training(curves, scores["raw pixels"], "euclidean", other)
    results = {"scores": scores, "curves": curves._asdict()}
    if with_bank is not None:
        picture.suptitle("without a bank, and MAP@R also with the bank", fontsize=12)
        results["curves with the bank"] = with_bank._asdict()
    figures.save(picture, output / "distributed.png")
    (output / "distributed.json").write_text(json.dumps(results) + "\n")


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    images = prepare(options.output, data.digits)
    if images is None:
        return 1
    device = join(options.device)
    try:
        return run(options, images, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
