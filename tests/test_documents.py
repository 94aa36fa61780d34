"""README.md and docs/: snippets run and compute what they say, links lead somewhere, tables are tables."""

import math
import os
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import ranks
import torch
import torch.distributed as dist

import triplet_ext
from triplet_ext.data import PKBatchSampler

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/results/*.md")]
}
SEMANTICS = DOCUMENTS["docs/semantics.md"]
CODE = r"```python\n((?:(?!```).)*)```"
PAIR = re.compile(CODE + r"\n\nEquivalent to:\n\n" + CODE, re.S)
PAIRS = PAIR.findall(SEMANTICS)


def snippets(name):
    return re.findall(CODE, DOCUMENTS[name], re.S)


def snippet(name, word):
    (found,) = [code for code in snippets(name) if word in code]
    return found


def tensors():
    generator = torch.Generator().manual_seed(7)
    names = ("embeddings", "memory", "anchor", "positive", "negative")
    rows = {name: torch.randn(60, 8, generator=generator, dtype=torch.float64).requires_grad_() for name in names}
    labels = {name: torch.randint(18, (60,), generator=generator) for name in ("labels", "memory_labels")}
    return rows, labels


# --- snippets -------------------------------------------------------------------------------------------------

# Those that stand alone; test_keras.py executes the one of docs/keras.md.
ALONE = [("README.md", "optimizer.step()"), ("docs/semantics.md", "hard_triplet_mining"), ("docs/keras.md", "keras")]
ALONE += [("docs/semantics.md", "PKBatchSampler")]
# On two processes.
ALONE += [
    ("docs/distributed.md", f"# {what}\n")
    for what in ("DistributedDataParallel", "FSDP2", "sub-groups", "compile", "a memory bank")
]


def test_every_snippet_is_executed():
    assert len(PAIRS) == SEMANTICS.count("Equivalent to:") >= 6
    found = [code for name in DOCUMENTS for code in snippets(name)]
    executed = [code for pair in PAIRS for code in pair] + [snippet(*where) for where in ALONE]
    assert sorted(found) == sorted(executed)
    assert sum(text.count("```") for text in DOCUMENTS.values()) == 2 * len(found), "a fence of another kind"


@pytest.mark.parametrize("ours, theirs", PAIRS, ids=[f"pair{i}" for i in range(len(PAIRS))])
def test_equivalence(ours, theirs):
    """Both sides of each "Equivalent to:" give the same value and the same gradients."""
    rows, labels = tensors()
    space = {"torch": torch, "triplet_ext": triplet_ext, **rows, **labels}
    results = []
    for code in (ours, theirs):  # one namespace: the second may use what the first has mined
        exec(code, space)
        grads = torch.autograd.grad(space["loss"], list(rows.values()), allow_unused=True)
        assert any(g is not None and g.any() for g in grads)
        results.append((space["loss"], grads))
    (value, grads), (wanted_value, wanted_grads) = results
    torch.testing.assert_close(value, wanted_value)
    for name, g, w in zip(rows, grads, wanted_grads):
        zero = torch.zeros_like(rows[name])
        torch.testing.assert_close(
            zero if g is None else g, zero if w is None else w, msg=lambda m, n=name: f"{n}: {m}"
        )


class Images(torch.utils.data.Dataset):
    """Of 40 classes, each around a centre of its own."""

    def __init__(self):
        generator = torch.Generator().manual_seed(7)
        self.targets = (torch.arange(400) % 40).tolist()
        centres = torch.randn(40, 16, generator=generator)
        self.pixels = centres[self.targets] + 0.5 * torch.randn(400, 16, generator=generator)

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return self.pixels[index], self.targets[index]


def test_the_training_loop_trains(capsys):
    torch.manual_seed(7)
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    space = {"dataset": Images(), "model": model, "optimizer": torch.optim.Adam(model.parameters(), 3e-3)}
    exec(snippet("README.md", "optimizer.step()"), space)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [int(epoch) for epoch, _, _ in lines] == list(range(20))
    losses, active = ([float(line[k]) for line in lines] for k in (1, 2))
    assert all(math.isfinite(loss) for loss in losses) and losses[-1] < losses[0] / 2
    assert 0 <= active[-1] < active[0] <= 1


def test_the_hardest_triplets():
    rows, labels = tensors()
    space = {"triplet_ext": triplet_ext, **rows, **labels}
    exec(snippet("docs/semantics.md", "hard_triplet_mining"), space)
    assert [space[name].shape for name in ("anchor", "positive", "negative")] == [(10, 8)] * 3
    losses = (space["anchor"] - space["positive"]).pow(2).sum(1) - (space["anchor"] - space["negative"]).pow(2).sum(1)
    assert losses.diff().ge(0).all() and losses[0] > 0


def test_the_sampler():
    space = {"PKBatchSampler": PKBatchSampler, "labels": torch.arange(320) % 16}
    exec(snippet("docs/semantics.md", "PKBatchSampler"), space)
    sampler, state = space["sampler"], space["state"]
    assert f"# {state}".replace("'", '"') in snippet("docs/semantics.md", "PKBatchSampler")
    batches = list(sampler)
    assert len(batches) == len(sampler) and {len(batch) for batch in batches} == {8 * 4}
    assert sampler.epoch == state["epoch"] + 1


# --- snippets on two processes ---------------------------------------------------------------------------------


def on_two_processes():
    """What the snippets of docs/distributed.md take, with the same weights on both ranks."""
    torch.manual_seed(7)
    layers = [torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 8)]
    dataset = Images()
    dataset.pixels = dataset.pixels.double()
    model = torch.nn.Sequential(*layers).double()
    return {"torch": torch, "TripletLoss": triplet_ext.TripletLoss, "dataset": dataset, "model": model}


def parameters_of_one(space, batches):
    """Trained by one process on these batches, as the snippets train."""
    model, normalize = space["model"], torch.nn.functional.normalize
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for rows in batches:
        labels = torch.tensor(space["dataset"].targets)[rows]
        loss = triplet_ext.TripletLoss(0.2)(normalize(model(space["dataset"].pixels[rows])), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def the_loop_under_ddp(rank, size):
    space = on_two_processes()
    exec(snippet("docs/distributed.md", "# DistributedDataParallel\n"), space)
    found = [p.detach() for p in space["model"].parameters()]
    alone = on_two_processes()
    samplers = [PKBatchSampler(alone["dataset"].targets, 8, 4, num_replicas=2, rank=r) for r in range(2)]
    expected = parameters_of_one(alone, [a + b for a, b in zip(*samplers)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def the_step_under_fsdp(rank, size):
    space, rows = on_two_processes(), [list(range(20)), list(range(20, 50))]
    space["images"] = space["dataset"].pixels[rows[rank]]
    space["labels"] = torch.tensor(space["dataset"].targets)[rows[rank]]
    exec(snippet("docs/distributed.md", "# FSDP2\n"), space)
    found = [p.full_tensor().detach() for p in space["model"].parameters()]
    torch.testing.assert_close(found, parameters_of_one(on_two_processes(), [sum(rows, [])]), rtol=0, atol=1e-12)


def a_group_of_a_mesh(rank, size):
    space = on_two_processes()
    exec(snippet("docs/distributed.md", "# sub-groups\n"), space)
    assert "process_group=2 ranks" in repr(space["criterion"])


def the_compiled_loss(rank, size):
    space, whole = on_two_processes(), torch.randn(12, 5, dtype=torch.float64)
    labels = torch.arange(12) % 3
    space["embeddings"], space["labels"] = whole.chunk(2)[rank].requires_grad_(), labels.chunk(2)[rank]
    eager = space["torch"].compile
    space["torch"].compile = lambda loss, fullgraph: eager(loss, fullgraph=fullgraph, backend="aot_eager")
    try:
        exec(snippet("docs/distributed.md", "# compile\n"), space)
    finally:
        space["torch"].compile = eager
    torch.testing.assert_close(space["loss"].detach(), triplet_ext.TripletLoss(0.2)(whole, labels).detach())


def the_loop_with_a_bank(rank, size):
    generator = torch.Generator().manual_seed(3)
    # Of 8 classes with 5 samples, most of which come more than once.
    numbers = torch.randint(8, (6, 24), generator=generator) + 40 * torch.randint(5, (6, 24), generator=generator)

    def trained(model, batches, world, warm_up):
        space = on_two_processes()
        space["model"] = model(space["model"])
        pixels, labels = space["dataset"].pixels, torch.tensor(space["dataset"].targets)
        space["loader"] = [(pixels[rows], labels[rows], rows) for rows in batches]
        space["optimizer"] = torch.optim.SGD(space["model"].parameters(), lr=0.1)
        space["torch"] = SimpleNamespace(distributed=SimpleNamespace(group=SimpleNamespace(WORLD=world)))
        space["normalize"], space["warm_up"] = torch.nn.functional.normalize, warm_up
        space["MemoryBank"] = partial(triplet_ext.MemoryBank, dtype=torch.float64)
        exec(snippet("docs/distributed.md", "# a memory bank\n").replace("size=4096, dim=128", "size=60, dim=8"), space)
        return [p.detach() for p in space["model"].parameters()], list(space["bank"].buffers())

    ddp = torch.nn.parallel.DistributedDataParallel
    found = trained(ddp, [rows.chunk(2)[rank] for rows in numbers], dist.group.WORLD, warm_up=1)
    torch.testing.assert_close(found, trained(lambda model: model, numbers, None, warm_up=1), rtol=0, atol=1e-12)
    without = trained(lambda model: model, numbers, None, warm_up=6)
    assert (found[0][0] - without[0][0]).abs().max() > 1e-6


def test_there_is_no_world_before_init_process_group():
    assert dist.group.WORLD is None


def test_on_two_processes(request):
    functions = [the_loop_under_ddp, the_step_under_fsdp, a_group_of_a_mesh, the_compiled_loss, the_loop_with_a_bank]
    failures = ranks.run(2, functions, request.config.triplet_ext_seed)
    assert not failures, "\n".join(failures.values())


# --- what the README says of distances and margins ------------------------------------------------------------


def test_the_cosine_distance_of_unit_rows_halves_margin_and_loss():
    rows, labels = tensors()
    x = torch.nn.functional.normalize(rows["embeddings"].detach())
    squared = triplet_ext.TripletLoss(0.4)(x, labels["labels"])
    assert squared > 0.4 and torch.cdist(x, x).square().max() <= 4 + 1e-9
    torch.testing.assert_close(triplet_ext.TripletLoss(0.2, distance="cosine")(x, labels["labels"]), squared / 2)


def test_a_collapsed_batch_has_the_margin_as_its_loss():
    x, y = torch.ones(12, 4), torch.arange(12) % 3
    for mining in ("batch_hard", "semi_hard", "batch_all"):
        assert triplet_ext.TripletLoss(0.25, mining=mining)(x, y) == 0.25
    soft = triplet_ext.TripletLoss(0, distance="euclidean", soft_margin=True)(x, y)
    assert float(soft) == pytest.approx(math.log(2)) and "log 2 = 0.693" in DOCUMENTS["README.md"]


# --- errors ---------------------------------------------------------------------------------------------------


def test_the_error_shown_is_the_error_raised():
    call, kind, text = re.search(r">>> (.*)\n    (\w+): (.*)\n", SEMANTICS).groups()
    rows, labels = tensors()
    with pytest.raises(ValueError, match=re.escape(text)) as caught:
        eval(call, {"triplet_ext": triplet_ext, **rows, **labels})
    assert caught.type.__name__ == kind


# --- form -----------------------------------------------------------------------------------------------------


def prose(text):
    """Without code, in which brackets and bars mean something else."""
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    return re.sub(r"^    .*$", "", text, flags=re.M)


def anchors(text):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.M)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(DOCUMENTS[name])):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        found = os.path.normpath(os.path.join(os.path.dirname(name), path)) if path else name
        assert (ROOT / found).exists(), f"{target}: no such file"
        assert not anchor or anchor in anchors(DOCUMENTS[found]), f"{target}: no such heading"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_tables(name):
    for table in re.findall(r"(?:^\|.*\n)+", prose(DOCUMENTS[name]), re.M):
        rows = [re.sub(r"`[^`]*`", "", line).strip().strip("|").split("|") for line in table.splitlines()]
        assert len({len(row) for row in rows}) == 1, table
        assert all(re.fullmatch(r" *:?-+:? *", cell) for cell in rows[1]), table


def test_every_document_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)", DOCUMENTS["README.md"]))
    assert linked == {name for name in DOCUMENTS if name.startswith("docs/")}


def test_the_readme_is_short():
    assert DOCUMENTS["README.md"].count("\n") <= 150
