"""What only a GPU can show: streams, devices, graphs, memory, and the selection from tiles on tensor cores."""

import oracle
import pytest
import torch
from common import assert_chosen, assert_same, classes, numpy, rows

from triplet_ext import TripletLoss, _ops, explain, mine

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and _ops.has_kernel("select_hardest", "cuda")), reason="no GPU, or no CUDA kernels"
)

# So much work, B R D, that the selection goes through tiles.
LARGE = (1500, 130)


def step(criterion, x, *rest, **more):
    loss = criterion(x, *rest, **more)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), x)]


def batch(rng, count=64, depth=16, dtype=torch.float32, device="cuda", kinds=None):
    x = rows(rng, count, depth, dtype, device=device)
    return x.requires_grad_(), torch.from_numpy(rng.integers(0, kinds or count // 4, count)).to(device)


def test_the_kernels_serve(rng):
    x, y = batch(rng)
    assert "CUDA kernels: used" in explain(x, y)


@pytest.mark.parametrize("shape", [(64, 16), LARGE])
def test_on_another_stream(rng, shape):
    x, y = batch(rng, *shape)
    expected = step(TripletLoss(), x, y)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = step(TripletLoss(), x, y)
    torch.cuda.current_stream().wait_stream(stream)
    assert_same(got, expected)


@pytest.mark.parametrize("shape", [(64, 16), LARGE, (3000, 8)])
def test_capture_and_replay(rng, shape):
    criterion = TripletLoss(reduction="mean_active")
    x, y = batch(rng, *shape)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(criterion, x, y)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(criterion, x, y)
    for _ in range(3):
        fresh, labels = batch(rng, *shape)
        with torch.no_grad():
            x.copy_(fresh)
            y.copy_(labels)
        graph.replay()
        assert_same(captured, step(criterion, fresh, labels))


@pytest.mark.parametrize("shape", [(64, 16), LARGE, (3000, 8)])
def test_bitwise_equal_from_run_to_run(rng, shape):
    x, y = batch(rng, *shape)
    expected = step(TripletLoss(soft_margin=True), x, y)
    for _ in range(10):
        assert_same(step(TripletLoss(soft_margin=True), x, y), expected)


def test_deterministic_algorithms_are_all_there_is(rng):
    x, y = batch(rng)
    torch.use_deterministic_algorithms(True)
    try:
        step(TripletLoss(), x, y)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_device_that_is_not_the_current_one(rng):
    x, y = batch(rng)
    expected = step(TripletLoss(), x, y)
    other = x.detach().to("cuda:1").requires_grad_()
    got = step(TripletLoss(), other, y.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    assert all(tensor.device == other.device for tensor in got)
    assert_same([tensor.cpu() for tensor in got], [tensor.cpu() for tensor in expected])


def test_running_out_of_memory_leaves_no_damage(rng):
    x, y = batch(rng)
    expected = step(TripletLoss(), x, y)
    torch.cuda.empty_cache()
    large = torch.zeros(1, 64, device="cuda").expand(1 << 22, 64)  # its workspace would take gigabytes
    labels = torch.zeros(1 << 22, dtype=torch.int64, device="cuda")
    torch.cuda.set_per_process_memory_fraction(0.005)
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            mine(large, labels)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert_same(step(TripletLoss(), x, y), expected)


def test_mixed_devices_name_both(rng):
    x, y = batch(rng)
    with pytest.raises(ValueError, match=r"labels must be on the device of embeddings, cuda:0, got cpu"):
        TripletLoss()(x, y.cpu())


@pytest.mark.parametrize(
    ("dtype", "precision", "loose"),
    [
        (torch.float32, "highest", 2e-6),
        (torch.float32, "high", 4e-3),
        (torch.float32, "medium", 4e-2),
        (torch.float16, "highest", 2e-6),
        (torch.bfloat16, "highest", 2e-6),
    ],
)
@pytest.mark.parametrize("distance", ["squared_euclidean", "cosine"])
@pytest.mark.parametrize("apart", [False, True])
def test_selection_from_tiles(rng, dtype, precision, loose, distance, apart):
    x, y = batch(rng, *LARGE, dtype)
    r, z = batch(rng, 2100, LARGE[1], dtype, kinds=300) if apart else (x, y)
    if distance == "cosine" and dtype != torch.float32:
        loose = 4e-3  # unit rows are multiplied as TF32
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        references = {"ref_embeddings": r.detach(), "ref_labels": z} if apart else {}
        got = mine(x.detach(), y, distance=distance, **references)
    finally:
        torch.set_float32_matmul_precision(before)
    wide, others, labels = numpy(x), numpy(r), z.cpu()
    for a, p, n in zip(*(index.tolist() for index in got)):
        rank = oracle.ranks(wide[a], others, distance)
        same = (labels == y[a].item()).numpy()
        assert same[p] and not same[n]
        if not apart:
            same[a] = False
            assert p != a
        assert rank[p] >= rank[same].max() - loose * rank.max()
        other = rank[(labels != y[a].item()).numpy()].min()
        assert rank[n] <= other + loose * rank.max()


def test_ties_in_tiles_go_to_the_lowest_index(rng):
    x = torch.from_numpy(rng.integers(-2, 3, (1800, 100))).float().cuda()
    x[1000:1400] = x[:400]
    y = classes(rng, 1800, 300, device="cuda")
    got = mine(x, y)
    wanted = mine(x.cpu(), y.cpu())
    assert_same([index.cpu() for index in got], list(wanted))


def test_rows_that_are_not_finite_in_tiles(rng):
    x, y = batch(rng, *LARGE)
    x = x.detach()
    x[7, 3], x[900, 0] = torch.nan, torch.inf
    got, wanted = mine(x, y), mine(x.cpu(), y.cpu())
    assert_same(got.anchor.cpu(), wanted.anchor)
    of = x.cpu()[wanted.anchor]
    labels = y.cpu()
    for mine_, theirs in ((got.positive, wanted.positive), (got.negative, wanted.negative)):
        bad = ~x.cpu()[theirs].isfinite().all(1) | ~of.isfinite().all(1)
        assert_same(mine_.cpu()[bad], theirs[bad])
        keep = ~bad
        assert_chosen(
            mine_.cpu()[keep].tolist(),
            theirs[keep].tolist(),
            of[keep].cuda(),
            labels[wanted.anchor][keep],
            "squared_euclidean",
            x,
            y,
        )
