"""benchmarks/cluster.py: what it counts is what the loss sends, and docs/distributed.md holds what it prints."""

import sys
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from triplet_ext import TripletLoss

sys.path.append(str(Path(__file__).resolve().parents[1]))  # last: an installed triplet_ext goes first

from benchmarks import cluster  # noqa: E402


class Collectives(TorchDispatchMode):
    """The bytes of this rank in each collective, by its name."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).split(".")[1]
        if function.namespace == "_c10d_functional" and name != "wait_tensor":
            tensors = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            self.found.append((name, [x.numel() * x.element_size() for x in tensors]))
        return function(*args, **(kwargs or {}))


def count(rank, size):
    rows, width = 6, 5
    for mining in ("batch_hard", "batch_all"):
        for dtype, kind in ((torch.float32, "float32"), (torch.bfloat16, "half")):
            for equal in (False, True):
                x, y = torch.randn(rows, width).to(dtype).requires_grad_(), torch.arange(rows) % 3
                loss = TripletLoss(mining=mining, process_group=dist.group.WORLD, equal_batches=equal)
                with Collectives() as collectives:
                    loss(x, y).backward()
                one = cluster.received(2, rows, width, cluster.TYPES[kind])
                gather, scatter = "all_gather_into_tensor_coalesced", "reduce_scatter_tensor"
                expected = [
                    (gather, [one["sizes"]]),
                    (gather, [one["rows"], one["labels"]]),
                    (gather, [one["sums"]]),
                    (scatter, [2 * one["gradient"]]),  # whose input is the gradient of all rows, its own among them
                ]
                assert collectives.found == expected[equal:]


def test_the_bytes_are_those_of_the_loss(request):
    failures = ranks.run(2, [count], request.config.triplet_ext_seed)
    assert not failures, "\n".join(failures.values())


def test_bytes_by_hand():
    assert cluster.received(8, 64, 128, 2) == {
        "sizes": 7 * 104,
        "rows": 7 * 64 * 256,
        "labels": 7 * 64 * 8,
        "sums": 7 * 48,
        "gradient": 7 * 64 * 256,
    }
    assert cluster.held(8, 64, 128, 2) == 8 * 64 * (3 * 256 + 8)


def test_milliseconds_by_hand():
    fast, slow = cluster.LINKS
    # One node, nothing to send: LL, 6.6 us and 7 hops of 0.6; a GB: Simple, 8.4 us and 7 hops of 3.4.
    assert cluster.collective(fast, 8, 0) == pytest.approx(6.6e-3 + 7 * 0.6e-3)
    assert cluster.collective(fast, 8, 1e9) == pytest.approx(8.4e-3 + 7 * 3.4e-3 + 1e3 / 450)
    # Eight nodes: 7 of the 63 hops by network, and a GB through a node's 12.5 GB/s.
    assert cluster.collective(slow, 64, 0) == pytest.approx(6.6e-3 + 56 * 0.6e-3 + 7 * 2.7e-3)
    assert cluster.collective(slow, 64, 1e9) == pytest.approx(8.4e-3 + 56 * 3.4e-3 + 7 * 14e-3 + 80)
    for kind, measured in cluster.MEASURED.items():  # a rank with half of the rows has as many pairs as were measured
        for width, milliseconds in measured.items():
            assert cluster.selection(2, 16384, width, kind) == pytest.approx(milliseconds)
    assert cluster.selection(8, 64, 128, "half") == cluster.MEASURED_LEAST


def test_where_the_selection_takes_as_long_as_the_bytes():
    links = cluster.LINKS[1]
    pair = cluster.a_pair("float32", 512)
    rows = cluster.rows_to_outweigh(links, 1024, 512, "float32", pair)
    sent = cluster.received(1024, 1, 512, 4)
    transfer = 1e3 * rows * (sent["rows"] + sent["labels"] + sent["gradient"]) / links.node
    assert 1024 * rows**2 * pair == pytest.approx(transfer)


def test_the_document_holds_the_tables():
    assert cluster.written().strip() == cluster.block().strip(), "python -m benchmarks.cluster --write"


def test_the_measured_times_are_those_of_the_benchmarks():
    text = (cluster.DOCUMENT.parent / "benchmarks.md").read_text()
    for kind, name in (("half", "bfloat16"), ("float32", "float32")):
        for width, milliseconds in cluster.MEASURED[kind].items():
            assert f"| {name}, {cluster.MEASURED_ROWS} × {width} | {milliseconds} | " in text
