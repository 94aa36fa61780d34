"""The losses among the rest of torch: compile, export, autocast, scalers, copies, modes, and no waiting."""

import copy
import io
import itertools
import pickle
import shutil
import warnings

import numpy as np
import oracle
import pytest
import torch
from common import DISTANCES, REDUCTIONS, assert_gradient, assert_same, assert_value, classes, numpy, row_numbers, rows
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from triplet_ext import (
    MemoryBank,
    Mining,
    TripletLoss,
    TripletMarginLoss,
    Triplets,
    _ops,
    functional,
    hard_triplet_mining,
    reference,
)

MEASURE = (0.5, "euclidean", True, True, "mean")


# --- compile and export ---------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def fresh():
    """Compiled code is kept by the code of the function: tests must not meet that of others."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def explicit(loss, x, y):
    return loss(x[: len(x) // 3], x[len(x) // 3 : len(x) // 3 * 2], x[len(x) // 3 * 2 : len(x) // 3 * 3])


def mined(loss, x, y):
    return loss(x, y)


def mined_references(loss, x, y):
    return loss(x[: len(x) // 2], y[: len(x) // 2], ref_embeddings=x, ref_labels=y, ref_offset=0)


def mined_offset(loss, x, y):
    half = x.shape[0] // 2
    return loss(x[half:], y[half:], ref_embeddings=x.detach(), ref_labels=y, ref_offset=half)


def indexed(loss, x, y):
    index = torch.arange(x.shape[0], device=x.device)
    return loss(x, triplets=Triplets(index, index.roll(1), index.roll(2)))


FORMS = (explicit, mined, mined_references, mined_offset, indexed)


def check_compiled(step, rng, device, sizes=(24, 40, 57)):
    """Same values and gradients, without a break, and without one compilation per size."""
    for count in sizes:
        x, y = rows(rng, count, 8, torch.float32, device=device), classes(rng, count, device=device)
        results = []
        for function in step:
            v = x.clone().requires_grad_()
            value = function(v, y)
            value.sum().backward()
            results.append((value.detach(), v.grad))
        (value, grad), (wanted_value, wanted_grad) = results
        torch.testing.assert_close(value, wanted_value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad, wanted_grad, rtol=1e-5, atol=1e-6)
        assert wanted_grad.any()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_compile(rng, device, backend, form):
    """fullgraph, a dynamic batch, forward and backward."""
    compilations = []

    def compiler(graph, inputs):
        compilations.append(graph)
        return make_boxed_func(graph.forward)

    criterion = TripletLoss(0.5, distance="euclidean", swap=True)

    def step(x, y):
        return form(criterion, torch.nn.functional.normalize(x), y)

    compiled = torch.compile(step, backend=aot_autograd(fw_compiler=compiler), fullgraph=True, dynamic=True)
    check_compiled((compiled, step), rng, device)
    assert 1 <= len(compilations) <= 4, "compiled anew for each size"


@pytest.mark.parametrize("distance, reduction", list(zip((*DISTANCES, DISTANCES[0]), REDUCTIONS)))
def test_compile_options(rng, device, backend, distance, reduction):
    criterion = TripletLoss(0.3, distance=distance, soft_margin=True, reduction=reduction)
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True, dynamic=True)
    check_compiled((compiled, TripletLoss(0.3, distance=distance, soft_margin=True, reduction=reduction)), rng, device)
    x, y = rows(rng, 30, 8, torch.float32, device=device), classes(rng, 30, device=device)
    compiled(x, y)
    before = criterion.stats.positive_distance
    compiled(x * 2, y)
    assert (criterion.stats.positive_distance != before) == (distance != "cosine"), "stats are not those of the call"


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="inductor needs a C++ compiler")
def test_compile_by_default(rng, device):
    """torch.compile as it comes, with inductor."""
    criterion = TripletLoss(0.5, distance="euclidean", swap=True)

    def step(x, y):
        return criterion(torch.nn.functional.normalize(x), y)

    check_compiled((torch.compile(step, fullgraph=True, dynamic=True), step), rng, device, sizes=(24, 40))


def test_compile_the_drop_in(rng, device, backend):
    criterion = TripletMarginLoss(p=3, swap=True)
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True, dynamic=True)
    check_compiled((lambda x, y: explicit(compiled, x, y), lambda x, y: explicit(criterion, x, y)), rng, device)


def test_compile_refuses_what_eager_refuses(device, backend):
    compiled = torch.compile(TripletLoss(), backend="aot_eager")
    with pytest.raises(Exception, match="labels must have shape"):
        compiled(torch.ones(4, 2, device=device), torch.zeros(3, dtype=torch.int64, device=device))


def test_export(rng, device, backend):
    """As part of a model, with a dynamic batch; the program runs at other sizes."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(8, 4)
            self.loss = TripletLoss(0.2, swap=True)

        def forward(self, x, y):
            return self.loss(self.layer(x), y)

    model = Model().to(device)
    x, y = rows(rng, 30, 8, torch.float32, device=device), classes(rng, 30, device=device)
    batch = torch.export.Dim("batch", min=2, max=4096)
    program = torch.export.export(model, (x, y), dynamic_shapes=({0: batch}, {0: batch}))
    for count in (30, 17, 64):
        x, y = rows(rng, count, 8, torch.float32, device=device), classes(rng, count, device=device)
        torch.testing.assert_close(program.module()(x, y), model(x, y))
    assert _ops.indexed_triplet_loss in [node.target for node in program.graph.nodes]


def test_a_loss_that_was_not_called_yet():
    """Its statistics are an attribute that is not there: what walks over attributes does not fail."""
    loss = TripletLoss()
    assert not hasattr(loss, "stats")
    with pytest.raises(RuntimeError, match="stats describe the last call, and this loss has not been called yet"):
        loss.stats  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        loss.nonsense  # noqa: B018
    x, y = torch.randn(6, 3), torch.arange(6) // 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(TripletLoss(), (x, y))
    assert traced(x, y) == TripletLoss()(x, y)


@pytest.mark.parametrize("k", [3, 10**4])
def test_hard_triplets_while_compiling(k):
    x, y = torch.randn(30, 3), torch.arange(30) // 3
    compiled = torch.compile(lambda x: hard_triplet_mining(2 * x, y, 1.0, k) + 1, backend="aot_eager")
    assert torch.equal(compiled(x), hard_triplet_mining(2 * x, y, 1.0, k) + 1)


# --- the operators --------------------------------------------------------------------------------------------


def samples(device):
    """(operator, arguments) over what is optional."""
    x, r = torch.randn(9, 5, device=device), torch.randn(12, 5, device=device)
    y, z = torch.arange(9, device=device) // 3, torch.arange(12, device=device) // 4
    index = [torch.randint(9, (7,), device=device) for _ in range(3)]
    p, n = index[1].new_tensor([1, 0, -1, 4, 3, 3, 7, -1, 6]), index[2].new_tensor([3, 3, 3, -1, 0, 0, 0, -1, 0])
    for dtype in (torch.float32, torch.bfloat16):
        three = [torch.randn(7, 5, device=device, dtype=dtype) for _ in range(3)]
        for distance, power in (("cosine", 2.0), ("p_norm", 3.0)):
            measure = (0.5, distance, power, 1e-6, True, False, "mean")
            yield _ops.triplet_loss, (*three, *measure)
            loss, distances, stats = _ops.triplet_loss(*three, *measure)
            yield _ops.triplet_loss_backward, (loss, *three, distances, stats, *measure)
    for references, anchor, positive, negative, reduction in (
        (None, *index, "none"),
        (r, *index, "mean"),
        (None, None, p, n, "mean_active"),
        (r, None, p, n, "none"),
    ):
        measure = (*MEASURE[:4], reduction)
        inputs = (x, references, anchor, positive, negative)
        yield _ops.indexed_triplet_loss, (*inputs, *measure)
        loss, distances, stats = _ops.indexed_triplet_loss(*inputs, *measure)
        yield _ops.indexed_triplet_loss_backward, (loss, *inputs, distances, stats, *measure)
    yield _ops.select_hardest, (x, y, None, None, None, "cosine")
    yield _ops.select_hardest, (x, y, r, z, None, "euclidean")
    yield _ops.select_hardest, (x, y, r, z, 2, "squared_euclidean")
    yield _ops.select_pair, (x, y, None, None, None, "cosine", "easy", "hard")
    yield _ops.select_pair, (x, y, r, z, 2, "euclidean", "hard", "semi_hard")
    for batch, rules, measure in (
        ((x, y, None, None, None), ("all", "all"), (0.5, "euclidean", False, True, "none")),
        ((x, y, r, z, None), ("all", "semi_hard"), (0.5, "cosine", True, False, "mean")),
        ((x, y, r, z, 2), ("easy", "all"), (0.5, "squared_euclidean", False, False, "mean_active")),
    ):
        yield _ops.mined_triplet_loss, (*batch, *rules, *measure)
        loss, saved, stats = _ops.mined_triplet_loss(*batch, *rules, *measure)
        yield _ops.mined_triplet_loss_backward, (loss, *batch, saved, stats, *rules, *measure)
    memory, labels = torch.randn(20, 5, device=device), torch.arange(20, device=device) % 4
    bank = (memory, labels, torch.tensor(13, device=device))
    for batch, ids, rules, measure in (
        ((x, y, None, None), (None, None), ("all", "all"), (0.5, "euclidean", False, True, "none")),
        ((x, y, r, z), (y, labels), ("all", "semi_hard"), (0.5, "cosine", True, False, "mean")),
    ):
        inputs = (*batch, *bank, *ids, None)
        yield _ops.select_with_memory, (*inputs, "cosine", "easy", "semi_hard")
        yield _ops.mined_triplet_loss_with_memory, (*inputs, *rules, *measure)
        loss, saved, stats = _ops.mined_triplet_loss_with_memory(*inputs, *rules, *measure)
        yield _ops.mined_triplet_loss_with_memory_backward, (loss, *inputs, saved, stats, *rules, *measure)


def test_opcheck(device, backend):
    seen = set()
    for operator, arguments in samples(device):
        torch.library.opcheck(operator, arguments)
        seen.add(operator.name().split("::")[1].split(".")[0])
    assert seen == set(_ops.SCHEMAS)


def test_opcheck_can_fail(device):
    """A fake of another shape is found."""
    with torch.library._scoped_library("triplet_ext_test", "DEF") as library:
        library.define("wrong(Tensor x) -> Tensor")
        library.impl("wrong", lambda x: x.sum(0), "CompositeExplicitAutograd")
        torch.library.register_fake("triplet_ext_test::wrong", lambda x: x.new_empty(()), lib=library)
        with pytest.raises(Exception, match="fake|shape|Shapes|mismatch"):
            torch.library.opcheck(torch.ops.triplet_ext_test.wrong.default, (torch.ones(2, 3, device=device),))


# --- nobody waits ---------------------------------------------------------------------------------------------


def every_call(x, y, three, triplets, r, z):
    for reduction in REDUCTIONS:
        for distance in DISTANCES:
            criterion = TripletLoss(0.5, distance=distance, swap=True, soft_margin=True, reduction=reduction)
            yield criterion, criterion(x, y), [x]
            yield criterion, criterion(x, y, ref_embeddings=r, ref_labels=z, ref_offset=1), [x, r]
            yield criterion, criterion(*three), three
            yield criterion, criterion(x, triplets=triplets), [x]
            yield criterion, criterion(x, triplets=triplets, ref_embeddings=r), [x, r]
        if reduction != "mean_active":
            for p in (1, 2, 3, float("inf")):
                yield None, TripletMarginLoss(p=p, swap=True, reduction=reduction)(*three), three


def inputs_on(device, dtype=torch.float32):
    x, r = (torch.ones(n, 4, device=device, dtype=dtype, requires_grad=True) for n in (10, 14))
    y, z = (torch.ones(n, device=device, dtype=torch.int32) for n in (10, 14))
    three = [torch.ones(2, 3, 4, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    triplets = Triplets(*(torch.ones(6, dtype=torch.int64, device=device) for _ in range(3)))
    return x, y, three, triplets, r, z


@pytest.mark.parametrize("create_graph", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tensors_without_values(dtype, create_graph):
    """On the meta device every .item(), .tolist(), nonzero() or boolean index would raise."""
    with pytest.raises(RuntimeError):
        torch.ones(3, device="meta").nonzero()
    for criterion, value, inputs in every_call(*inputs_on("meta", dtype)):
        grads = torch.autograd.grad(value, inputs, torch.ones_like(value), create_graph=create_graph)
        assert value.device.type == "meta" and [g.shape for g in grads] == [x.shape for x in inputs]
        if create_graph:
            torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)
        elif criterion:
            assert all(stat.device.type == "meta" and stat.shape == () for stat in criterion.stats)


def test_fake_tensors(device):
    with FakeTensorMode(allow_non_fake_inputs=False):
        for _, value, inputs in every_call(*inputs_on(device)):
            grads = torch.autograd.grad(value, inputs, torch.ones_like(value))
            assert value.device.type == device and [g.shape for g in grads] == [x.shape for x in inputs]


def test_the_reference_does_not_wait():
    """It serves devices without kernels: there, too, no value may be looked at."""
    x, r = torch.ones(9, 5, device="meta"), torch.ones(12, 5, device="meta")
    y, z = (torch.ones(len(v), dtype=torch.int64, device="meta") for v in (x, r))
    for distance in DISTANCES:
        positive, negative = reference.select_hardest(x, y, None, None, None, distance)
        assert positive.shape == negative.shape == (9,)
        positive, negative = reference.select_hardest(x, y, r, z, 1, distance)
        for references in (None, r):
            for anchor in (None, positive):
                for reduction in REDUCTIONS:
                    measure = (0.5, distance, True, True, reduction)
                    inputs = (x, references, anchor, positive, negative)
                    loss, distances, stats = reference.indexed_triplet_loss(*inputs, *measure)
                    reference.indexed_triplet_loss_backward(loss, *inputs, distances, stats, *measure)
    for p in (1.0, 2.0, 3.0, float("inf")):
        measure = (0.5, "p_norm", p, 1e-6, True, False, "mean")
        loss, distances, stats = reference.triplet_loss(x, x, x, *measure)
        reference.triplet_loss_backward(loss, x, x, x, distances, stats, *measure)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_no_synchronisation_on_a_gpu(rng):
    """torch itself says when the host waits."""
    x, y = rows(rng, 64, 8, torch.float32, device="cuda").requires_grad_(), classes(rng, 64, device="cuda")
    three = [x.detach().clone().requires_grad_() for _ in range(3)]
    triplets = Triplets(*row_numbers(rng, 50, 64, 64, 64, device="cuda"))
    calls = lambda: every_call(x, y, three, triplets, x.detach().clone().requires_grad_(), y)  # noqa: E731
    bank, ids = MemoryBank(100, 8).cuda(), torch.arange(64, device="cuda")
    list(calls())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        # ref_offset=1 needs a reference more than there are anchors.
        for reduction in REDUCTIONS:
            criterion = TripletLoss(reduction=reduction)
            criterion(x, y).sum().backward()
            criterion(x, triplets=triplets).sum().backward()
            criterion(*three).sum().backward()
            assert criterion.stats.active.is_cuda
        for rules in itertools.product(("hard", "easy", "all"), ("hard", "semi_hard", "all")):
            TripletLoss(mining=Mining(*rules))(x, y, memory=bank, ids=ids).backward()
            bank.enqueue(x, y, ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- what a backward reads ------------------------------------------------------------------------------------


def differentiable_calls(rng, device):
    """(name, function of the inputs, those inputs) through each Function, losses that nothing follows."""
    x, r = (rows(rng, count, 6, torch.float32, device=device) for count in (24, 30))
    y = torch.arange(24, device=device) // 3
    z = torch.cat([y, y[:6]])
    three = [rows(rng, 20, 6, torch.float32, device=device) for _ in range(3)]
    triplets = Triplets(*row_numbers(rng, 40, 24, 24, 24, device=device))
    more = dict(ref_labels=z)
    yield "explicit", TripletLoss(distance="cosine", swap=True), three
    yield "drop-in", TripletMarginLoss(p=3), three
    yield "indexed", lambda v: TripletLoss(soft_margin=True)(v, triplets=triplets), [x]
    yield "batch_hard", lambda v: TripletLoss()(v, y), [x]
    yield "batch_hard, references", lambda v, w: TripletLoss()(v, y, ref_embeddings=w, **more), [x, r]
    yield "batch_all", lambda v: TripletLoss(mining="batch_all")(v, y), [x]
    batch_all = TripletLoss(mining="batch_all", reduction="mean_active")
    yield "batch_all, references", lambda v, w: batch_all(v, y, ref_embeddings=w, **more), [x, r]


def first_and_second(function, inputs):
    """Gradients by backward(), then with create_graph, then those of a penalty on these."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    function(*inputs).backward()
    first = [x.grad for x in inputs]
    graph = torch.autograd.grad(function(*inputs), inputs, create_graph=True)
    second = torch.autograd.grad(sum((g**2).sum() for g in graph), inputs)
    return [*first, *(g.detach() for g in graph), *second]


def test_checkpointing(rng, device, backend):
    """What was not kept is computed again, in the middle of a backward."""
    layer = torch.nn.Linear(6, 5, device=device)
    for name, function, inputs in differentiable_calls(rng, device):

        def model(*rows, function=function):
            return function(*(torch.tanh(layer(x)) for x in rows))

        expected = first_and_second(model, inputs)
        got = first_and_second(lambda *rows, model=model: checkpoint(model, *rows, use_reentrant=False), inputs)
        for a, b in zip(got, expected):
            assert torch.equal(a, b), name
        leaves = [x.clone().requires_grad_() for x in inputs]
        checkpoint(model, *leaves, use_reentrant=True).backward()  # this kind has backward() alone
        for x, b in zip(leaves, expected):
            assert torch.equal(x.grad, b), name


def test_saved_tensors_are_read_once(rng, device, backend):
    """Each unpacking may be a copy from another device or from a disk."""
    for name, function, inputs in differentiable_calls(rng, device):
        expected = first_and_second(function, inputs)
        unpacked = []

        def pack(x, unpacked=unpacked):
            unpacked.append(0)
            return len(unpacked) - 1, x.detach().clone()

        def unpack(packed, unpacked=unpacked):
            unpacked[packed[0]] += 1
            return packed[1]

        leaves = [x.clone().requires_grad_() for x in inputs]
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            loss = function(*leaves)
        loss.backward()
        assert unpacked and set(unpacked) == {1}, name
        for x, b in zip(leaves, expected):
            assert torch.equal(x.grad, b), name


def test_offloading(rng, device, backend):
    for name, function, inputs in differentiable_calls(rng, device):
        expected = first_and_second(function, inputs)
        with torch.autograd.graph.save_on_cpu():
            got = first_and_second(function, inputs)
        for a, b in zip(got, expected):
            assert torch.equal(a, b), name


# --- precision and scalers ------------------------------------------------------------------------------------


def test_autocast(rng, device, backend):
    """What a layer makes of it is bfloat16; the loss is measured in float32."""
    layer = torch.nn.Linear(8, 6, device=device)
    x, y = rows(rng, 30, 8, torch.float32, device=device), classes(rng, 30, device=device)
    options = oracle.Options(0.3, "euclidean", True)
    with torch.autocast(device, dtype=torch.bfloat16):
        embeddings = layer(x)
        assert embeddings.dtype == torch.bfloat16
        criterion = TripletLoss(**options._asdict())
        values = [criterion(embeddings, y), criterion(embeddings, embeddings.roll(1, 0), embeddings.roll(2, 0))]
    for value in values:
        assert value.dtype == torch.float32
    expected = oracle.batch_hard(numpy(embeddings), y.tolist(), options)
    assert_value(values[0], expected.value, expected.scale)
    e = numpy(embeddings)
    expected = oracle.explicit(e, np.roll(e, 1, 0), np.roll(e, 2, 0), options)
    assert_value(values[1], expected.value, expected.scale)  # of float32: not rounded to bfloat16
    sum(values).backward()
    assert layer.weight.grad.dtype == torch.float32 and layer.weight.grad.any()


def test_autocast_of_mixed_types(rng, device, backend):
    """A bfloat16 batch meets a float32 memory, as in torch's own losses; without autocast that is an error."""
    x, r = rows(rng, 20, 6, torch.bfloat16, device=device), rows(rng, 30, 6, torch.float32, device=device)
    y, z = classes(rng, 20, 6, device), None
    z = y[torch.from_numpy(rng.integers(0, 20, 30)).to(device)]
    options = oracle.Options(0.3)
    x.requires_grad_()
    r.requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        value = functional.mined_triplet_loss(x, y, margin=0.3, ref_embeddings=r, ref_labels=z)
        other = functional.triplet_loss(x, r[:20], r[10:], margin=0.3)
    expected = oracle.batch_hard(numpy(x), y.tolist(), options, numpy(r), z.tolist())
    assert_value(value, expected.value, expected.scale)
    for v, e in zip((x, r), expected.gradients):
        (grad,) = torch.autograd.grad(value, v, retain_graph=True)
        assert grad.dtype == v.dtype
        assert_gradient(grad, e, expected.steepness)
    expected = oracle.explicit(numpy(x), numpy(r[:20]), numpy(r[10:]), options)
    assert other.dtype == torch.float32
    assert_value(other, expected.value, expected.scale)
    with pytest.raises(TypeError, match="positive must have the dtype of anchor, torch.bfloat16, got torch.float32"):
        functional.triplet_loss(x, r[:20], r[10:])


@pytest.mark.parametrize("sick", [False, True], ids=["finite", "overflow"])
def test_grad_scaler(rng, device, backend, sick):
    """A row that overflowed makes the scaler skip the step and back off; one that did not, does not."""
    layer = torch.nn.Linear(4, 4, device=device)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    x, y = rows(rng, 16, 4, torch.float32, device=device), classes(rng, 16, 4, device=device)
    if sick:
        x[int(rng.integers(16)), 2] = float("inf")
    before = layer.weight.detach().clone()
    scaler.scale(TripletLoss()(layer(x), y)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(before, layer.weight) == sick
    assert scaler.get_scale() == (512.0 if sick else 1024.0)


# --- modules --------------------------------------------------------------------------------------------------

OPTIONS = dict(distance="cosine", swap=True, soft_margin=True, reduction="sum")


@pytest.mark.parametrize("how", ["deepcopy", "copy", "pickle", "torch.save"])
def test_copies(rng, device, backend, how):
    x, y = rows(rng, 20, 6, torch.float32, device=device).requires_grad_(), classes(rng, 20, device=device)

    def save_and_load(loss):
        file = io.BytesIO()
        torch.save(loss, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    duplicate = {
        "deepcopy": copy.deepcopy,
        "copy": copy.copy,
        "pickle": lambda loss: pickle.loads(pickle.dumps(loss)),
        "torch.save": save_and_load,
    }[how]
    fresh = TripletLoss(0.3, **OPTIONS)
    assert_same(duplicate(fresh)(x, y), fresh(x, y))
    used = duplicate(fresh)  # after a call, which it knows nothing of
    with pytest.raises(RuntimeError, match="stats describe the last call, and this loss has not been called yet"):
        used.stats  # noqa: B018
    assert fresh.stats.triplets == fresh.stats.anchors > 0
    assert_same(used(x, y), fresh(x, y))
    assert_same(list(used.stats), list(fresh.stats))
    assert repr(used) == repr(fresh)
    drop_in = TripletMarginLoss(0.3, p=3, swap=True)
    assert_same(duplicate(drop_in)(x, x + 1, x * 2), drop_in(x, x + 1, x * 2))


def test_state_dict():
    """Nothing in it, nor before or after a call; checkpoints of models with and without the loss agree."""
    loss = TripletLoss()
    loss(torch.eye(4), torch.tensor([0, 0, 1, 1]))
    assert loss.state_dict() == {} and not list(loss.parameters()) and not list(loss.buffers())
    assert not loss.load_state_dict({}).missing_keys
    assert loss.to(torch.float64).train().eval().requires_grad_(False) is loss


def test_repr():
    text = repr(TripletLoss(0.3, **OPTIONS))
    for part in ("margin=0.3", "mining='batch_hard'", *(f"{key}={value!r}" for key, value in OPTIONS.items())):
        assert part in text


def test_options_can_be_changed(rng, device, backend):
    """The attributes are what counts, as in torch.nn: schedules of the margin work."""
    x, y = rows(rng, 20, 6, torch.float32, device=device), classes(rng, 20, device=device)
    loss = TripletLoss(0.1)
    loss(x, y)
    loss.margin = 0.7
    assert_same(loss(x, y), TripletLoss(0.7)(x, y))


# --- modes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_modes(rng, device, backend, mode):
    x, y = rows(rng, 20, 6, torch.float32, device=device).requires_grad_(), classes(rng, 20, device=device)
    three = [rows(rng, 5, 6, torch.float32, device=device).requires_grad_() for _ in range(3)]
    triplets = Triplets(*row_numbers(rng, 9, 20, 20, 20, device=device))
    criterion = TripletLoss(0.2, distance="euclidean")
    calls = (lambda: criterion(x, y), lambda: criterion(*three), lambda: criterion(x, triplets=triplets))
    for call in calls:
        with mode():
            value = call()
            criterion.stats.active.item()
        assert not value.requires_grad
        assert_same(value.clone(), call().detach())


def test_tensors_made_in_inference_mode(rng, device, backend):
    y = classes(rng, 20, device=device)
    with torch.inference_mode():
        x = rows(rng, 20, 6, torch.float32, device=device) * 1
    assert_same(TripletLoss()(x, y), TripletLoss()(x.clone(), y))


def test_frozen_embeddings_give_a_loss_without_a_graph(rng, device, backend):
    x, y = rows(rng, 20, 6, torch.float32, device=device), classes(rng, 20, device=device)
    assert not TripletLoss()(x, y).requires_grad


def test_hooks_and_accumulation(rng, device, backend):
    """Gradients flow through what came before, add up over calls, and pass hooks."""
    layer = torch.nn.Linear(6, 4, device=device, dtype=torch.float64)
    x, y = rows(rng, 24, 6, device=device), classes(rng, 24, device=device)
    seen = []
    embeddings = layer(x)
    embeddings.register_hook(seen.append)
    (TripletLoss()(embeddings, y) + TripletLoss(distance="cosine")(embeddings, y)).backward()
    total = layer.weight.grad.clone()
    layer.weight.grad = None
    TripletLoss()(layer(x), y).backward()
    TripletLoss(distance="cosine")(layer(x), y).backward()
    torch.testing.assert_close(layer.weight.grad, total)
    assert len(seen) == 1


def test_it_trains(rng, device, backend):
    """A linear map learns to look away from what does not tell the classes apart."""
    y = torch.arange(60, device=device) // 6
    signal = 2 * rows(rng, 10, 3, torch.float32, device=device)[y]
    x = torch.cat([signal, 3 * rows(rng, 60, 5, torch.float32, device=device)], 1)
    layer = torch.nn.Linear(8, 3, device=device)
    criterion = TripletLoss(0.5, distance="euclidean", soft_margin=True)
    optimizer = torch.optim.Adam(layer.parameters(), 0.05)
    values = []
    for _ in range(60):
        optimizer.zero_grad()
        value = criterion(layer(x), y)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.8 * values[0]
