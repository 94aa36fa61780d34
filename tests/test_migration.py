"""docs/migration.md: each row beside the library that it names, values and gradients."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

import triplet_ext
from triplet_ext import Mining, TripletLoss, Triplets

sys.path.append(str(Path(__file__).resolve().parents[1]))  # last: an installed triplet_ext goes first

from benchmarks import sides  # noqa: E402

ROOT = Path(__file__).parents[1]
HEAD, RULE, *LINES = [line for line in (ROOT / "docs" / "migration.md").read_text().splitlines() if line[:1] == "|"]
CELLS = [line.strip("| ").split(" | ") for line in LINES]
ROWS = {cells[0]: cells[1] for cells in CELLS}

M, WIDER = 0.3, 0.5  # the loss's margin, and a miner's


def row(*words):
    """The row whose first cell contains all of these."""
    (found,) = [cell for cell in ROWS if all(word in cell for word in words)]
    return found


def pml(module):
    return pytest.importorskip(f"pytorch_metric_learning.{module}")


def st():
    pytest.importorskip("sentence_transformers")
    return sides.sentence_transformers_losses()


def margin_loss(miner=None, plain=False, **options):
    """pytorch-metric-learning's loss, as people use it: it normalises and averages over the active."""
    if plain:
        distance = pml("distances").LpDistance(normalize_embeddings=False, power=2)
        options |= {"distance": distance, "reducer": pml("reducers").MeanReducer()}
        miner = pml("miners").BatchHardMiner(distance=distance)
    loss = pml("losses").TripletMarginLoss(margin=M, **options)
    return lambda x, y: loss(x, y, miner(x, y) if miner else None)


def easy_hard(*rules):
    return margin_loss(pml("miners").BatchEasyHardMiner(*rules))


def margin_miner(**options):
    return pml("miners").TripletMarginMiner(margin=WIDER, **options)


def embedded(name, **options):
    """A loss of sentence-transformers on ready-made embeddings, without its model."""
    loss = getattr(st(), name)(None, **options)
    return lambda x, y: loss.compute_loss_from_embeddings([x], y)


PML = "pytorch-metric-learning: "
WITHOUT_MINER = row(PML, "without a miner")
OTHER_MINER = row(PML, "any other miner")
PEERS = {
    row(PML, "BatchHardMiner` +"): lambda: margin_loss(pml("miners").BatchHardMiner()),
    row("MeanReducer()"): lambda: margin_loss(plain=True),
    WITHOUT_MINER: margin_loss,
    row("TripletMarginMiner(margin=M)"): lambda: margin_loss(margin_miner()),
    row(PML, "BatchEasyHardMiner()"): easy_hard,
    OTHER_MINER: lambda: margin_loss(margin_miner(type_of_triplets="semihard")),
    row("BatchHardTripletLoss(model"): lambda: embedded("BatchHardTripletLoss", margin=M),
    row("BatchHardSoftMarginTripletLoss"): lambda: embedded("BatchHardSoftMarginTripletLoss"),
    row("BatchSemiHardTripletLoss"): lambda: embedded("BatchSemiHardTripletLoss", margin=M),
    row("BatchAllTripletLoss"): lambda: embedded("BatchAllTripletLoss", margin=M),
}
EXPLICIT = row("sentence-transformers: `TripletLoss(model)`")
RULES = row("BatchEasyHardMiner(P, N)")
TENSORFLOW = [row("`TripletHardLoss("), row("`TripletSemiHardLoss("), row("distance_metric=")]
ELSEWHERE = [row("torch.nn.TripletMarginLoss"), row("a Keras loss")]  # test_torch_equality.py, test_keras.py


def test_every_row_is_verified():
    assert set(ROWS) == {*PEERS, EXPLICIT, RULES, *TENSORFLOW, *ELSEWHERE} and len(ROWS) == len(CELLS)


def test_the_readme_shows_some_of_these_rows():
    section = (ROOT / "README.md").read_text().split("## Coming from another library\n")[1].split("\n## ")[0]
    head, rule, *lines = [line for line in section.splitlines() if line[:1] == "|"]
    assert [head, rule] == [HEAD, RULE] and lines
    assert [line for line in LINES if line in lines] == lines, "each as it stands there, in that order"


def batch(pulled=1.5):
    """A batch of 12 classes, pulled together until no miner lacks a negative beyond its positive."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(48) % 12
    x = torch.randn(48, 8, generator=generator, dtype=torch.float64)
    return (x + pulled * x[:12][labels]).requires_grad_(), labels


def code(cell, **space):
    """What a row's second cell says first, evaluated."""
    return eval(re.search("`(.*?)`", ROWS[cell])[1], {"TripletLoss": TripletLoss, "m": M, **space})


def ours(cell, x, y):
    if "the same: " in ROWS[cell]:
        cell = WITHOUT_MINER
    names = {"normalize": normalize, "Triplets": Triplets, "embeddings": x, "labels": y}
    if cell == OTHER_MINER:
        return code(cell, miner=margin_miner(type_of_triplets="semihard"), **names)
    return code(cell)(normalize(x) if "on `normalize(embeddings)`" in ROWS[cell] else x, y)


def assert_same(ours, theirs, leaves):
    torch.testing.assert_close(ours, theirs)
    assert float(ours.detach()) > 0
    for mine, other in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves)):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("cell", PEERS)
def test_the_same_values_and_gradients(cell):
    peer = PEERS[cell]()
    x, y = batch()
    assert_same(ours(cell, x, y), peer(x, y), [x])


@pytest.mark.parametrize("positive", ["hard", "easy", "all"])
@pytest.mark.parametrize("negative", ["hard", "semihard", "all"])
def test_rules_of_batch_easy_hard_miner(positive, negative):
    if (positive, negative) == ("all", "semihard"):
        with pytest.raises(ValueError, match="cannot be used in combination"):
            easy_hard(positive, negative)
        return
    peer = easy_hard(positive, negative)
    names = {"Mining": Mining, "P": positive, "N": negative.replace("semihard", "semi_hard")}
    (option,) = re.findall(r"`mining=(Mining\(P, N\))`", ROWS[RULES])
    criterion = TripletLoss(M, distance="euclidean", mining=eval(option, names), reduction="mean_active")
    x, y = batch(pulled=3.0)
    assert_same(criterion(normalize(x), y), peer(x, y), [x])


def test_explicit_triplets_of_sentence_transformers():
    generator = torch.Generator().manual_seed(3)
    a, p, n = (torch.randn(20, 8, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3))
    theirs = st().TripletLoss(None).compute_loss_from_embeddings([a, p, n], None)
    assert_same(code(EXPLICIT, a=a, p=p, n=n), theirs, [a, p, n])


# --- TensorFlow Addons: what 0.23.0 gives on TensorFlow 2.15.1, its last one --------------------------------------

ADDONS = {  # (loss, distance_metric): value, gradient of the first row, norm of the gradient
    ("TripletHardLoss", "L2"): (1.3366781, (0.0827859, 0.1223531, -0.0235291), 0.5642034),
    ("TripletHardLoss", "squared-L2"): (3.5112183, (0.5998244, 0.5529900, -0.4474521), 2.3001392),
    ("TripletHardLoss", "angular"): (1.3578949, (-0.0210118, 0.0026129, -0.0299858), 0.4073234),
    ("TripletSemiHardLoss", "L2"): (0.1719884, (0.0513806, 0.0114258, -0.0325940), 0.3033829),
    ("TripletSemiHardLoss", "squared-L2"): (0.2843815, (0.1580188, 0.0939097, -0.1602870), 0.7085562),
    ("TripletSemiHardLoss", "angular"): (0.2318450, (-0.0081185, -0.0632239, -0.0646812), 0.2341565),
}


def addons_batch():
    x = (torch.arange(36, dtype=torch.float64) ** 2).cos().view(12, 3)
    return x.requires_grad_(), torch.arange(12) // 3


@pytest.mark.parametrize(("name", "metric"), ADDONS)
def test_tensorflow_addons(name, metric):
    value, first_row, norm = ADDONS[name, metric]
    hard, semi_hard, metrics = TENSORFLOW
    criterion = code(hard if name == "TripletHardLoss" else semi_hard)
    assert metric == "L2" or metric in metrics
    names = dict(zip(("squared-L2", "angular"), re.findall('"(.*?)"', ROWS[metrics])))
    x, y = addons_batch()
    loss = TripletLoss(M, distance=names.get(metric, criterion.distance), mining=criterion.mining)(x, y)
    (gradient,) = torch.autograd.grad(loss, x)
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(loss.item(), value, **close)
    torch.testing.assert_close(gradient[0], torch.tensor(first_row, dtype=torch.float64), **close)
    torch.testing.assert_close(gradient.norm().item(), norm, **close)


def test_an_anchor_without_a_positive_in_tensorflow_addons():
    x, y = addons_batch()
    x, y[-1] = x.detach(), 9
    hard, semi_hard = (code(cell) for cell in TENSORFLOW[:2])
    alone = torch.relu(M - torch.cdist(x[-1:], x[:-1]).min())
    assert float(11 * hard(x, y) + alone) / 12 == pytest.approx(1.2351236, rel=1e-5)  # counted, as d_ap = 0
    assert float(semi_hard(x, y)) == pytest.approx(0.2023483, rel=1e-5)  # it has no pair


# --- what differs -------------------------------------------------------------------------------------------------


def test_a_batch_of_one_class():
    x = batch()[0].detach()
    y = torch.zeros(len(x), dtype=torch.int64)
    peer = embedded("BatchSemiHardTripletLoss", margin=M)(x, y)
    assert float(peer) > 1 and float(ours(row("BatchSemiHardTripletLoss"), x, y)) == 0
    assert float(embedded("BatchHardTripletLoss", margin=M)(x, y)) == pytest.approx(M)


def test_anchors_without_a_negative_beyond_the_positive():
    angle = torch.tensor([0.0, 180, 10, 25]).deg2rad()
    x, y = torch.stack((angle.cos(), angle.sin()), 1), torch.tensor([0, 0, 1, 1])
    anchor, _, _, _ = pml("miners").BatchEasyHardMiner()(x, y)
    mined = triplet_ext.mine(x, y, "easy_positive", distance="euclidean")
    assert anchor.tolist() == [2, 3]
    assert mined.anchor.tolist() == [0, 1, 2, 3] and mined.negative.tolist() == [3, 2, 1, 0]


def test_margin_miner_takes_every_semi_hard_negative():
    x, y = batch()
    a, p, n = margin_miner(type_of_triplets="semihard")(x, y)
    nearest = triplet_ext.mine(normalize(x), y, "semi_hard", distance="euclidean")
    pairs = set(zip(a.tolist(), p.tolist()))
    assert len(a) > len(pairs)  # several negatives for a pair
    theirs, mine = set(zip(*(t.tolist() for t in (a, p, n)))), set(zip(*(t.tolist() for t in nearest)))
    assert {t for t in mine if t[:2] in pairs} <= theirs  # ours is among them
    assert len(mine) == len(y) * 3 > len(pairs)  # and each pair has one
