"""Trains a small Keras network on triplets of handwritten digits, and looks for nearest neighbours among others.

Needs Keras and scikit-learn: pip install 'triplet_ext[keras,demo]'. The same seed gives the same numbers.
"""

from __future__ import annotations

import os

os.environ["KERAS_BACKEND"] = "torch"  # before Keras is imported

import argparse

import images as data
import keras
import numpy as np
import torch
from retrieval import retrieval

from triplet_ext.integrations.keras import triplet_loss

WIDTH, DIMENSIONS = 64, 8  # of a scan, and of its embedding


def sample(labels: np.ndarray, each: int, rng: np.random.Generator) -> np.ndarray:
    """Triplets [T, 3] of sample numbers, every sample being the anchor of ``each`` of them."""
    triplets = []
    for label in np.unique(labels):
        own, others = (labels == label).nonzero()[0], (labels != label).nonzero()[0]
        place = np.tile(np.arange(len(own)), each)
        apart = rng.integers(1, len(own), len(place))  # nobody is their own positive
        triplets.append(np.stack((own[place], own[(place + apart) % len(own)], rng.choice(others, len(place))), 1))
    return np.concatenate(triplets)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=8, help="passes over the triplets (default 8)")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    options = parser.parse_args(argv)
    keras.utils.set_random_seed(options.seed)
    rng = np.random.default_rng(options.seed)

    digits = data.digits()
    scans, labels = digits.pixels.flatten(1).numpy(), digits.labels.numpy()
    order = rng.permutation(len(scans))
    test, train = order[:600], order[600:]

    scan = keras.Input((WIDTH,))
    hidden = keras.layers.Dense(128, activation="relu")(scan)
    embedder = keras.Model(scan, keras.layers.Dense(DIMENSIONS)(hidden))
    triplet = keras.Input((3, WIDTH))  # anchor, positive, negative
    model = keras.Model(triplet, keras.layers.TimeDistributed(embedder)(triplet))
    model.compile(loss=triplet_loss, optimizer="adam")

    def recall() -> float:
        embeddings = torch.from_numpy(embedder.predict(scans[test], verbose=0))
        return retrieval(embeddings, digits.labels[test])[0]

    before = recall()
    triplets = scans[train][sample(labels[train], 10, rng)]  # [T, 3, WIDTH]
    print(f"{len(triplets)} triplets of {len(train)} scans; {len(test)} others to test")
    unused = np.zeros(len(triplets))  # Keras demands a y_true
    history = model.fit(triplets, unused, batch_size=128, epochs=options.epochs, verbose=0).history["loss"]
    for epoch, loss in enumerate(history, 1):
        print(f"epoch {epoch}: loss {loss:.4f}")
    print(f"recall@1: {before:.4f} before, {recall():.4f} after")


if __name__ == "__main__":
    main()
