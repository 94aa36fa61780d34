"""Batches spread over processes: what one process with the whole batch gives."""

import contextlib
import copy
import itertools
import pickle

import pytest
import ranks
import torch
import torch.distributed as dist
from common import DISTANCES, REDUCTIONS
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from triplet_ext import Mining, TripletLoss, functional, mine

WORLD_SIZES = (1, 2, 3, 4)
STRATEGIES = [Mining(p, n) for p in ("hard", "easy", "all") for n in ("hard", "semi_hard", "all")]
TOLERANCE = {torch.float32: (1e-6, 1e-5), torch.float64: (1e-13, 1e-12)}  # of the loss, of the gradient


def counts_of(size, kind):
    """How many rows each rank has."""
    return {
        "equal": [6] * size,
        "unequal": [3 + 4 * (i % 3) for i in range(size)],
        "empty": [0 if i == size - 1 else 7 for i in range(size)],
    }[kind]


def batch_of(counts, width=5, dtype=torch.float64, classes=4):
    """The whole batch, the same on every rank; rank 0 has one class."""
    x = torch.randn(sum(counts), width, dtype=torch.float64).to(dtype)
    y = torch.randint(0, classes, (sum(counts),))
    y[: counts[0]] = 0
    return x, y


def own(x, counts, rank):
    return x.split(counts)[rank]


def assert_close(actual, expected, error, scale=None):
    """Up to the error, relative to the element or to the largest element of `scale`."""
    largest = scale.detach().abs().max().item() if scale is not None and scale.numel() else 0.0
    torch.testing.assert_close(actual.detach(), expected.detach(), rtol=error, atol=error * largest, equal_nan=True)


def compare(rank, size, group, counts, x, y, **options):
    """This rank's loss, gradient and statistics beside those of one process."""
    value_error, gradient_error = TOLERANCE[x.dtype]
    whole = x.clone().requires_grad_()
    one = TripletLoss(**options)
    expected = one(whole, y)
    (gradient,) = torch.autograd.grad(expected.sum(), whole)
    mine = own(x, counts, rank).clone().requires_grad_()
    equal = len(set(counts)) == 1
    loss = TripletLoss(**options, process_group=group, equal_batches=equal and bool(torch.rand(()) < 0.5))
    value = loss(mine, own(y, counts, rank))
    (found,) = torch.autograd.grad(value.sum(), mine)
    if options.get("reduction") == "none":
        expected = own(expected, counts, rank)
    else:
        everywhere = [torch.empty_like(value) for _ in range(size)]
        dist.all_gather(everywhere, value.detach(), group=group)
        assert all(torch.equal(other, everywhere[0]) for other in everywhere)
    assert_close(value, expected, value_error, expected)
    assert_close(found / size, own(gradient, counts, rank), gradient_error, gradient)
    for actual, wanted in zip(loss.stats, one.stats):
        assert_close(actual, wanted, value_error)


# --- what the processes run -----------------------------------------------------------------------------------


def every_option(rank, size):
    swaps = {rules: (False,) if rules.negative == "all" else (False, True) for rules in STRATEGIES}
    for rules, distance, reduction in itertools.product(STRATEGIES, DISTANCES, REDUCTIONS):
        for swap, kind in itertools.product(swaps[rules], ("equal", "unequal", "empty")):
            counts = counts_of(size, kind)
            dtype = torch.float64 if torch.rand(()) < 0.5 else torch.float32
            x, y = batch_of(counts, dtype=dtype)
            options = {"mining": rules, "distance": distance, "reduction": reduction, "swap": swap}
            options["soft_margin"] = bool(torch.rand(()) < 0.5)
            try:
                compare(rank, size, dist.group.WORLD, counts, x, y, **options)
            except AssertionError as error:
                raise AssertionError(f"{options} {kind} {dtype}") from error


def nothing_to_mine(rank, size):
    for counts in ([0] * size, [1] * size):
        for mining, reduction in itertools.product(("batch_hard", "batch_all"), REDUCTIONS):
            x, _ = batch_of(counts)
            y = torch.zeros(len(x), dtype=torch.int64)
            compare(rank, size, dist.group.WORLD, counts, x, y, mining=mining, reduction=reduction)


def a_row_that_is_not_finite(rank, size):
    counts = [4] * size
    x, y = batch_of(counts)
    x[-1, 0] = float("inf")
    for mining in ("batch_hard", "batch_all"):
        loss = TripletLoss(mining=mining, process_group=dist.group.WORLD)(own(x, counts, rank), own(y, counts, rank))
        assert loss.isnan()


def half_types(rank, size):
    counts = counts_of(size, "unequal")
    for dtype in (torch.float16, torch.bfloat16):
        x, y = batch_of(counts, dtype=dtype)
        whole = x.clone().requires_grad_()
        expected = TripletLoss(mining="semi_hard")(whole, y)
        (gradient,) = torch.autograd.grad(expected, whole)
        mine = own(x, counts, rank).clone().requires_grad_()
        value = TripletLoss(mining="semi_hard", process_group=dist.group.WORLD)(mine, own(y, counts, rank))
        (found,) = torch.autograd.grad(value, mine)
        assert value.dtype == torch.float32 and found.dtype == dtype
        assert_close(value, expected, 1e-6)
        error = 4 * torch.finfo(dtype).eps  # each rank's part and their sum are rounded
        assert_close(found / size, own(gradient, counts, rank), error, gradient)


def strides_and_label_types(rank, size):
    counts = counts_of(size, "unequal")
    x, y = batch_of(counts, width=8)
    whole = x.clone().requires_grad_()
    weight = torch.randn(len(x), dtype=x.dtype)
    expected = TripletLoss(reduction="none")(whole, y)
    (gradient,) = torch.autograd.grad(expected, whole, weight)
    mine = own(x, counts, rank).T.contiguous().T.requires_grad_()  # column by column
    loss = TripletLoss(reduction="none", process_group=dist.group.WORLD)
    value = loss(mine, own(y, counts, rank).to(torch.int32 if rank else torch.uint8))
    (found,) = torch.autograd.grad(value, mine, own(weight, counts, rank))
    assert_close(found / size, own(gradient, counts, rank), 1e-12, gradient)


def a_gradient_of_any_strides(rank, size):
    """What the gather hands backward: here the gradient of the gathered rows comes transposed."""
    from triplet_ext import _distributed

    counts = tuple(counts_of(size, "unequal"))
    x, y = batch_of(list(counts), width=3)
    mine = own(x, list(counts), rank).clone().requires_grad_()
    group = _distributed.group_of(dist.group.WORLD, False)
    rows, labels = _distributed._Gathered.apply(mine, own(y, list(counts), rank), counts, group, None)
    assert torch.equal(rows, x) and torch.equal(labels, y)
    weight = torch.randn(3, len(x), dtype=x.dtype).T
    for step in (weight, weight[:1].expand(len(x), 3)):
        (found,) = torch.autograd.grad(rows, mine, step, retain_graph=True)
        assert_close(found, size * own(step, counts, rank), 1e-12)


def some_ranks_need_no_gradient(rank, size):
    counts = counts_of(size, "unequal")
    x, y = batch_of(counts)
    whole = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(TripletLoss(mining="batch_all")(whole, y), whole)
    for detached in range(size):
        mine = own(x, counts, rank).clone().requires_grad_(rank != detached)
        loss = TripletLoss(mining="batch_all", process_group=dist.group.WORLD)(mine, own(y, counts, rank))
        assert loss.requires_grad
        loss.backward()
        if rank == detached:
            assert mine.grad is None
        else:
            assert_close(mine.grad / size, own(gradient, counts, rank), 1e-12, gradient)
    with torch.no_grad():
        assert not TripletLoss(process_group=dist.group.WORLD)(own(x, counts, rank), own(y, counts, rank)).requires_grad


def groups_within_the_world(rank, size):
    parts = [[0, 2], [1, 3]] if size == 4 else [[0, 2], [1]] if size == 3 else [[i] for i in range(size)]
    groups = [dist.new_group(part) for part in parts]
    for number, (part, group) in enumerate(zip(parts, groups)):
        torch.manual_seed(number)
        counts = counts_of(len(part), "unequal")
        x, y = batch_of(counts)
        if rank in part:
            compare(part.index(rank), len(part), group, counts, x, y, mining="semi_hard")
        else:
            with pytest.raises(ValueError, match="process_group must contain this process, got .*NON_GROUP_MEMBER"):
                TripletLoss(process_group=group)


def a_mesh(rank, size):
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("data",))
    counts = counts_of(size, "unequal")
    x, y = batch_of(counts)
    compare(rank, size, mesh.get_group(), counts, x, y)
    functional.mined_triplet_loss(own(x, counts, rank), own(y, counts, rank), process_group=mesh)
    two = init_device_mesh("cpu", (size, 1), mesh_dim_names=("data", "model"))
    compare(rank, size, two["data"].get_group(), counts, x, y)
    assert TripletLoss(process_group=two["data"])._group.size == size
    with pytest.raises(ValueError, match="process_group must be .* got a mesh of 2 dimensions"):
        TripletLoss(process_group=two)
    if size > 1:
        first = init_device_mesh("cpu", (size,))
        from torch.distributed.device_mesh import DeviceMesh

        first = DeviceMesh("cpu", list(range(size - 1)))
        if rank == size - 1:
            with pytest.raises(ValueError, match="process_group must contain this process"):
                TripletLoss(process_group=first)
        else:
            assert TripletLoss(process_group=first)._group.size == size - 1


def positions_in_the_whole_batch(rank, size):
    counts = counts_of(size, "unequal")
    x, y = batch_of(counts)
    first = sum(counts[:rank])
    for mining in STRATEGIES:
        expected = mine(x, y, mining)
        found = mine(own(x, counts, rank), own(y, counts, rank), mining, process_group=dist.group.WORLD)
        here = (expected.anchor >= first) & (expected.anchor < first + counts[rank])
        assert torch.equal(found.anchor, expected.anchor[here] - first)
        assert torch.equal(found.positive, expected.positive[here])
        assert torch.equal(found.negative, expected.negative[here])


def disagreements(rank, size):
    x, y = torch.randn(4, 3), torch.tensor([0, 0, 1, 1])
    last = rank == size - 1
    group = {"process_group": dist.group.WORLD}

    def loss(x=x, y=y, **options):
        return TripletLoss(**options, **group)(x, y)

    def without_gradient():
        with torch.set_grad_enabled(not last):
            return loss()

    different = {
        "margin": lambda: loss(margin=0.5 if last else 1.0),
        "distance": lambda: loss(distance="cosine" if last else "euclidean"),
        "mining.positive": lambda: loss(mining="semi_hard" if last else Mining("hard", "semi_hard")),
        "mining.negative": lambda: loss(mining="batch_all" if last else "semi_hard"),
        "swap": lambda: loss(swap=last),
        "soft_margin": lambda: loss(soft_margin=last),
        "reduction": lambda: loss(reduction="sum" if last else "none"),
        "embeddings.dtype": lambda: loss(x.double() if last else x),
        "embeddings.shape[1]": lambda: loss(x[:, :2] if last else x),
        "torch.is_grad_enabled()": without_gradient,
    }
    others = "rank 0" if size == 2 else f"ranks {', '.join(str(i) for i in range(size - 1))}"
    for name, call in different.items():
        if size == 1:
            call()
            continue
        with pytest.raises(ValueError) as caught:
            call()
        text = str(caught.value)
        assert text.startswith(f"{name} must be the same on all ranks of the process group, got ")
        assert text.endswith(f" on rank {size - 1}") and f" on {others} and " in text
    with pytest.raises(ValueError, match="ref_embeddings must be None with a process_group"):
        TripletLoss(**group)(x, y, ref_embeddings=x, ref_labels=y)


def a_rank_that_is_refused(rank, size):
    x, y = torch.randn(4, 3), torch.tensor([0, 0, 1, 1])
    last = rank == size - 1
    calls = (
        (
            ValueError,
            "labels must have shape",
            lambda: TripletLoss(process_group=dist.group.WORLD)(x, y[:3] if last else y),
        ),
        (TypeError, "loss takes", lambda: TripletLoss(process_group=dist.group.WORLD)(x, None if last else y)),
        (TypeError, "embeddings must be", lambda: mine([1.0] if last else x, y, process_group=dist.group.WORLD)),
        (
            ValueError,
            "margin must be",
            lambda: functional.mined_triplet_loss(x, y, margin=-1.0 if last else 1.0, process_group=dist.group.WORLD),
        ),
    )
    for error, text, call in calls:
        if last:
            with pytest.raises(error, match=text):
                call()
        else:
            with pytest.raises(RuntimeError, match=f"rank {size - 1} of the process group refused its arguments"):
                call()


def network():
    torch.manual_seed(5)
    layers = [torch.nn.Linear(7, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)]
    return torch.nn.Sequential(*layers).double()


def steps(model, loss, inputs, rank=None, counts=None, micro=1, **how):
    """Five steps of SGD; the parameters after them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for x, y in inputs:
        if counts is not None:
            x, y = own(x, counts, rank), own(y, counts, rank)
        optimizer.zero_grad()
        for i in range(micro):
            synchronise = i == micro - 1 or not hasattr(model, "no_sync")
            with contextlib.nullcontext() if synchronise else model.no_sync():
                if how.get("checkpointed"):
                    value = checkpoint(lambda x, y: loss(model(x), y), x, y, use_reentrant=False)
                else:
                    value = loss(model(x), y)
                (value / micro).backward()
        optimizer.step()
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in model.parameters()]


def inputs_of(counts):
    torch.manual_seed(6)
    return [batch_of(counts, width=7) for _ in range(5)]


def data_parallel(rank, size):
    for kind, mining, micro in (("equal", "batch_hard", 1), ("unequal", "semi_hard", 2), ("unequal", "batch_all", 1)):
        counts = counts_of(size, kind)
        inputs = inputs_of(counts)
        expected = steps(network(), TripletLoss(mining=mining), inputs)
        loss = TripletLoss(mining=mining, process_group=dist.group.WORLD)
        for how in ({}, {"checkpointed": True}):
            model = DistributedDataParallel(network())
            for found, wanted in zip(steps(model, loss, inputs, rank, counts, micro, **how), expected):
                assert_close(found, wanted, 1e-12, wanted)


def fully_sharded(rank, size):
    from torch.distributed.fsdp import fully_shard

    counts = counts_of(size, "unequal")
    inputs = inputs_of(counts)
    expected = steps(network(), TripletLoss(), inputs)
    model = network()
    mesh = init_device_mesh("cpu", (size,))
    for layer in model:
        if isinstance(layer, torch.nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for found, wanted in zip(steps(model, TripletLoss(process_group=mesh), inputs, rank, counts), expected):
        assert_close(found, wanted, 1e-12, wanted)


def autocast(rank, size):
    counts = counts_of(size, "unequal")
    x, y = batch_of(counts, dtype=torch.float32)
    layer = torch.nn.Linear(5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        expected = TripletLoss()(layer(x), y)
        value = TripletLoss(process_group=dist.group.WORLD)(layer(own(x, counts, rank)), own(y, counts, rank))
    assert value.dtype == torch.float32
    assert_close(value, expected, 1e-6)
    gradient = torch.autograd.grad(expected, layer.weight)[0]
    (found,) = torch.autograd.grad(value, layer.weight)
    dist.all_reduce(found)
    assert_close(found / size, gradient, 0.02, gradient)


def compiled(rank, size):
    counts = [6] * size
    x, y = batch_of(counts)
    for mining in ("batch_hard", "semi_hard"):
        whole = x.clone().requires_grad_()
        expected = TripletLoss(mining=mining)(whole, y)
        (gradient,) = torch.autograd.grad(expected, whole)
        for equal in (True, False):
            loss = TripletLoss(mining=mining, process_group=dist.group.WORLD, equal_batches=equal)
            mine = own(x, counts, rank).clone().requires_grad_()
            value = torch.compile(loss, fullgraph=equal, backend="aot_eager")(mine, own(y, counts, rank))
            (found,) = torch.autograd.grad(value, mine)
            assert_close(value, expected, 1e-12)
            assert_close(found / size, own(gradient, counts, rank), 1e-12, gradient)


def second_gradients(rank, size):
    """With g the gradient of W L: the derivative of the sum over the ranks of what each makes of its part of g."""
    counts = counts_of(size, "unequal")
    x, y = batch_of(counts)
    weight = torch.randn_like(x)
    for mining, distance in (("batch_hard", "euclidean"), ("batch_all", "squared_euclidean")):
        options = {"mining": mining, "distance": distance, "soft_margin": True}
        whole = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(TripletLoss(**options)(whole, y), whole, create_graph=True)
        (expected,) = torch.autograd.grad((gradient * weight).sum(), whole)
        mine = own(x, counts, rank).clone().requires_grad_()
        value = TripletLoss(**options, process_group=dist.group.WORLD)(mine, own(y, counts, rank))
        (found,) = torch.autograd.grad(value, mine, create_graph=True)
        (second,) = torch.autograd.grad((found * own(weight, counts, rank)).sum(), mine)
        assert_close(second / size, own(expected, counts, rank), 1e-11, expected)


def copies_have_no_group(rank, size):
    loss = TripletLoss(0.3, process_group=dist.group.WORLD, equal_batches=True)
    assert f"process_group={size} ranks, equal_batches=True" in repr(loss)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), copy.deepcopy(torch.nn.ModuleList([loss]))[0]):
        assert other.margin == 0.3 and other._group is None
        x, y = batch_of([6], width=3)
        assert torch.equal(other(x, y), TripletLoss(0.3)(x, y))
    assert loss._group.size == size


def bad_groups(rank, size):
    for value in ("gloo", 3, object()):
        with pytest.raises(TypeError, match="process_group must be a torch.distributed.ProcessGroup.* got "):
            TripletLoss(process_group=value)
    with pytest.raises(TypeError, match="equal_batches must be True or False, got 1"):
        TripletLoss(process_group=dist.group.WORLD, equal_batches=1)
    loss = TripletLoss(process_group=dist.group.WORLD)
    x = torch.randn(4, 3)
    with pytest.raises(TypeError, match=r"loss\(anchor, positive, negative\) takes no process_group"):
        loss(x, x, x)
    index = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"loss\(embeddings, triplets=...\) takes no process_group"):
        loss(x, triplets=(index, index, index))
    with pytest.raises(RuntimeError, match="inside a transform of torch.func"):
        torch.func.grad(lambda x: loss(x, torch.tensor([0, 0, 1, 1])))(x)


FUNCTIONS = [
    every_option,
    nothing_to_mine,
    a_row_that_is_not_finite,
    half_types,
    strides_and_label_types,
    a_gradient_of_any_strides,
    some_ranks_need_no_gradient,
    groups_within_the_world,
    a_mesh,
    positions_in_the_whole_batch,
    disagreements,
    a_rank_that_is_refused,
    data_parallel,
    fully_sharded,
    autocast,
    compiled,
    second_gradients,
    copies_have_no_group,
    bad_groups,
]


@pytest.mark.parametrize("size", WORLD_SIZES)
def test_ranks(request, size):
    failures = ranks.run(size, FUNCTIONS, request.config.triplet_ext_seed)
    assert not failures, "\n".join(failures.values())


def test_a_group_that_is_gone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    group = dist.group.WORLD
    dist.destroy_process_group()
    with pytest.raises(ValueError, match="process_group must be of a torch.distributed that is initialized"):
        TripletLoss(process_group=group)
