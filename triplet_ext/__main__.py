"""``python -m triplet_ext``: what is installed, and whether it computes what it should."""

from __future__ import annotations

import sys

import torch

from . import TripletLoss, _ops, build_info, explain, functional, mine, reference


def _self_check(device: torch.device) -> list[tuple[str, bool]]:
    """What runs on the device against the plain-PyTorch definition, on small random data."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(150, 33, generator=generator).to(device).requires_grad_()
    y = torch.randint(20, (150,), generator=generator).to(device)
    checks = []
    for distance in reference.DISTANCES:
        selected = _ops.select_hardest(x.detach(), y, None, None, None, distance)
        expected = reference.select_hardest(x.detach(), y, None, None, None, distance)
        checks.append((f"selection, {distance}", all(torch.equal(s, e) for s, e in zip(selected, expected))))

        (grad,) = torch.autograd.grad(TripletLoss(0.2, distance=distance)(x, y), x)
        triplets = mine(x, y, distance=distance)
        a, p, n = (x[index] for index in triplets)
        measure = reference.Measure(0.2, distance, 2.0, 0.0, False, False)
        t = reference.pair_distance(a, p, measure) - reference.pair_distance(a, n, measure) + 0.2
        (wanted,) = torch.autograd.grad(t.relu().mean(), x, retain_graph=True)
        checks.append((f"gradient of the mined loss, {distance}", torch.allclose(grad, wanted, 1e-4, 1e-6)))

        (grad,) = torch.autograd.grad(functional.triplet_loss(a, p, n, margin=0.2, distance=distance), x)
        checks.append((f"gradient of the explicit loss, {distance}", torch.allclose(grad, wanted, 1e-4, 1e-6)))
    return checks


def main() -> int:
    for name, value in build_info().items():
        print(f"{name:20} {value if value not in ('', [], None) else '-'}")
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    failed = 0
    for device in devices:
        print("\n" + explain(torch.empty(128, 128, device=device)))
        for name, passed in _self_check(device):
            failed += not passed
            print(f"  {'ok    ' if passed else 'FAILED'} {name}")
    print(f"\nself-check: {failed} failed" if failed else "\nself-check: ok")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
