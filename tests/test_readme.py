"""The README's snippets: both sides of each "Equivalent to:" give the same value and the same gradients."""

import pathlib
import re

import pytest
import torch

import triplet_ext

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
CODE = r"```python\n((?:(?!```).)*)```"
PAIR = re.compile(CODE + r"\n\nEquivalent to:\n\n" + CODE, re.S)
PAIRS = PAIR.findall(README)


def test_every_equivalence_is_found():
    assert len(PAIRS) == README.count("Equivalent to:") >= 5


def tensors():
    generator = torch.Generator().manual_seed(7)
    names = ("embeddings", "memory", "anchor", "positive", "negative")
    rows = {name: torch.randn(60, 8, generator=generator, dtype=torch.float64).requires_grad_() for name in names}
    labels = {name: torch.randint(18, (60,), generator=generator) for name in ("labels", "memory_labels")}
    return rows, labels


@pytest.mark.parametrize("ours, theirs", PAIRS, ids=[f"pair{i}" for i in range(len(PAIRS))])
def test_equivalence(ours, theirs):
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


def test_the_first_snippet_runs():
    snippet = re.search(r"```python\n(import torch, triplet_ext\n.*?)```", README, re.S).group(1)
    generator = torch.Generator().manual_seed(7)
    space = {
        "model": torch.nn.Linear(8, 4),
        "images": torch.randn(60, 8, generator=generator),
        "labels": torch.randint(18, (60,), generator=generator),
    }
    exec(snippet, space)
    assert space["model"].weight.grad.any()


def test_the_error_shown_is_the_error_raised():
    call, kind, text = re.search(r">>> (.*)\n    (\w+): (.*)\n", README).groups()
    rows, labels = tensors()
    with pytest.raises(ValueError, match=re.escape(text)) as caught:
        eval(call, {"triplet_ext": triplet_ext, **rows, **labels})
    assert caught.type.__name__ == kind
