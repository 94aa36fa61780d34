"""README.md and docs/: snippets run and compute what they say, links lead somewhere, tables are tables."""

import math
import os
import re
from pathlib import Path

import pytest
import torch

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
