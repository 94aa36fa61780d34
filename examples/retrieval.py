"""Nearest-neighbour metrics of an embedding, and its projection onto two dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1024  # queries at a time: memory stays at BLOCK * N


def retrieval(embeddings: Tensor, labels: Tensor) -> tuple[float, float]:
    """Recall@1 and MAP@R, every sample being the query once and the others the gallery.

    For a query with R others of its class, MAP@R is the mean over the ranks i = 1..R of the precision at i where
    rank i is of its class, 0 elsewhere (Musgrave, Belongie, Lim: A Metric Learning Reality Check, 2020). Queries
    whose class has no other sample do not count. Distances are Euclidean, in float64; ties: the lowest index.

    Args:
        embeddings: [N, D].
        labels: [N].

    Returns:
        (recall@1, MAP@R), NaN where no query counts.
    """
    x = embeddings.double()
    recall, mapr, queries = 0.0, 0.0, 0
    for start in range(0, len(x), BLOCK):
        rows = torch.arange(start, min(start + BLOCK, len(x)))
        distances = torch.cdist(x[rows], x, compute_mode="donot_use_mm_for_euclid_dist")
        distances[rows - start, rows] = torch.inf
        same = labels[rows, None] == labels
        r = same.sum(1) - 1
        hits = same.gather(1, distances.argsort(dim=1, stable=True)[:, : max(1, int(r.max()))])
        rank = torch.arange(1, hits.shape[1] + 1)
        hits = (hits & (rank <= r[:, None])).double()
        precision = hits.cumsum(1) / rank
        recall += float(hits[:, 0].sum())
        mapr += float(((precision * hits).sum(1) / r.clamp_min(1)).sum())
        queries += int((r > 0).sum())
    return (recall / queries, mapr / queries) if queries else (float("nan"), float("nan"))


def project(embeddings: Tensor) -> Tensor:
    """The two principal components, [N, D] -> [N, 2], each signed so that its largest value is positive."""
    x = embeddings.double()
    x = x - x.mean(0)
    directions = torch.linalg.eigh(x.T @ x).eigenvectors[:, -2:].flip(1)
    plane = x @ directions
    return plane * plane.gather(0, plane.abs().argmax(0, keepdim=True)).sign()
