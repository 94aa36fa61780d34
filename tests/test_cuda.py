"""What only a GPU can show: streams, devices, graphs, memory, the selection from tiles on tensor cores, and strategies
at sizes that fill the device."""

import oracle
import pytest
import torch
import torch.distributed as dist
from common import assert_chosen, assert_same, classes, numpy, rows

from triplet_ext import Mining, TripletLoss, _ops, explain, mine
from triplet_ext.mining import NEGATIVE_RULES, POSITIVE_RULES

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and _ops.has_kernel("select_hardest", "cuda")), reason="no GPU, or no CUDA kernels"
)

RULES = [(p, n) for p in POSITIVE_RULES for n in NEGATIVE_RULES if (p, n) != ("hard", "hard")]

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


def check_replay(criterion, x, y, fresh):
    """A step that was captured gives, with fresh inputs in its places, what one that wasn't gives."""
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
        embeddings, labels = fresh()
        with torch.no_grad():
            x.copy_(embeddings)
            y.copy_(labels)
        graph.replay()
        assert_same(captured, step(criterion, embeddings, labels))


@pytest.mark.parametrize("shape", [(64, 16), LARGE, (3000, 8)])
def test_capture_and_replay(rng, shape):
    criterion = TripletLoss(reduction="mean_active")
    x, y = batch(rng, *shape)
    check_replay(criterion, x, y, lambda: batch(rng, *shape))


@pytest.mark.parametrize("shape", [(64, 16), LARGE, (3000, 8)])
def test_bitwise_equal_from_run_to_run(rng, shape):
    x, y = batch(rng, *shape)
    expected = step(TripletLoss(soft_margin=True), x, y)
    for _ in range(10):
        assert_same(step(TripletLoss(soft_margin=True), x, y), expected)


@pytest.fixture
def group(tmp_path):
    """This process alone, over NCCL."""
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("positive, negative", [("hard", "hard"), *RULES])
def test_a_group_over_nccl(rng, group, positive, negative):
    for dtype, error in ((torch.float32, 2e-6), (torch.float64, 1e-12)):
        x, y = batch(rng, 96, 16, dtype)
        for reduction in ("mean", "mean_active", "sum", "none"):
            options = {"mining": Mining(positive, negative), "reduction": reduction}
            expected = step(TripletLoss(**options), x, y)
            for equal in (False, True):
                found = step(TripletLoss(**options, process_group=group, equal_batches=equal), x, y)
                for actual, wanted in zip(found, expected):
                    largest = wanted.abs().max().item()
                    torch.testing.assert_close(actual, wanted, rtol=error, atol=error * largest)


def test_a_step_over_a_group_is_captured(rng, group):
    criterion = TripletLoss(process_group=group, equal_batches=True)
    x, y = batch(rng)
    check_replay(criterion, x, y, lambda: batch(rng))


def test_equal_batches_do_not_wait_for_the_device(rng, group):
    criterion = TripletLoss(process_group=group, equal_batches=True)
    x, y = batch(rng)
    expected = step(criterion, x, y)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = step(criterion, x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(found, expected)


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


# --- every other strategy -------------------------------------------------------------------------------------------

strategies = pytest.mark.parametrize("rules", RULES, ids="x".join)


def together(rng, count, width, kinds, device="cuda"):
    """A batch of few classes, so that there is more than a forward can save of its positives."""
    x = rows(rng, count, width, torch.float32, device=device)
    return x.requires_grad_(), torch.from_numpy(rng.integers(0, kinds, count)).to(device)


@strategies
def test_strategies_never_wait(rng, rules):
    x, y = batch(rng)
    criterion = TripletLoss(mining=Mining(*rules))
    step(criterion, x, y)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(criterion, x, y)
        r, z = x.detach().roll(1, 0), y.roll(1, 0)
        step(criterion, x, y, ref_embeddings=r, ref_labels=z)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@strategies
@pytest.mark.parametrize(("shape", "kinds"), [((64, 16), 16), ((1500, 40), 3), ((3000, 130), 700)])
def test_strategies_capture_and_replay(rng, rules, shape, kinds):
    """And the number of rounds is not frozen: it is the labels' matter."""
    criterion = TripletLoss(0.5, mining=Mining(*rules), reduction="mean_active")
    x, y = together(rng, *shape, shape[0] // 4)
    check_replay(criterion, x, y, lambda: together(rng, *shape, kinds))


@strategies
@pytest.mark.parametrize("soft_margin", [False, True])
@pytest.mark.parametrize(("shape", "kinds"), [((700, 20), 2), ((2000, 64), 500)])
def test_strategies_are_bitwise_equal_from_run_to_run(rng, rules, soft_margin, shape, kinds):
    """Also while other work holds part of the device, and blocks take their turns in another order."""
    x, y = together(rng, *shape, kinds)
    criterion = TripletLoss(mining=Mining(*rules), soft_margin=soft_margin)
    expected = step(criterion, x, y)
    other, stream = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()
    for k in range(6):
        if k % 2:
            with torch.cuda.stream(stream):
                for _ in range(5):
                    torch.mm(other, other)
        assert_same(step(criterion, x, y), expected)


@strategies
@pytest.mark.parametrize("distance", ["squared_euclidean", "euclidean", "cosine"])
@pytest.mark.parametrize(("shape", "kinds"), [((500, 33), 3), ((500, 8), 120), ((1200, 300), 200)])
@pytest.mark.parametrize("apart", [False, True])
def test_strategies_are_the_cpus(rng, rules, distance, shape, kinds, apart):
    """In float64, where no choice hangs on rounding."""
    x = rows(rng, *shape, torch.float64)
    y = torch.from_numpy(rng.integers(0, kinds, shape[0]))
    r, z = rows(rng, 333, shape[1], torch.float64), torch.from_numpy(rng.integers(0, kinds, 333))
    results = []
    for device in ("cpu", "cuda"):
        criterion = TripletLoss(0.5, distance=distance, mining=Mining(*rules))
        leaves = [t.to(device).requires_grad_() for t in ((x, r) if apart else (x,))]
        keywords = {"ref_embeddings": leaves[1], "ref_labels": z.to(device)} if apart else {}
        loss = criterion(leaves[0], y.to(device), **keywords)
        stats = [float(s) for s in criterion.stats]
        results.append([loss.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(loss, leaves)), stats])
    for got, wanted in zip(results[1], results[0]):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@strategies
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strategies_take_memory_in_proportion_to_the_rows(rng, rules, dtype):
    """Four times the embeddings and 128 bytes a row, gradient included, and 4 MB for rounds; for a matrix there would
    be no room."""
    count, width = 16384, 128
    x, y = batch(rng, count, width, dtype)
    criterion = TripletLoss(mining=Mining(*rules))
    step(criterion, x, y)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(criterion, x, y)
    torch.cuda.synchronize()
    taken = torch.cuda.max_memory_allocated() - before
    assert taken <= count * (4 * width * x.element_size() + 128) + (4 << 20)
