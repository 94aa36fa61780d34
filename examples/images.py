"""What the demo trains on: scikit-learn's digit scans, or a folder of images; and who is trained on what."""

from __future__ import annotations

import pathlib
import sys
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

LISTED = 5  # problems told one by one
UNSEEN_DIGITS = (7, 8, 9)  # no demo trains on them


class Unusable(Exception):
    """Why there is nothing to train on, in one sentence."""


class Images(NamedTuple):
    pixels: Tensor  # [N, channels, size, size], 0 to 1
    labels: Tensor  # [N], int64
    names: list[str]  # of the classes


class Split(NamedTuple):
    """Sample numbers: a training and a test part of the seen classes, and all of the unseen classes."""

    train: Tensor
    seen: Tensor
    unseen: Tensor


def digits() -> Images:
    """1797 scans of handwritten digits, 8 x 8, bundled with scikit-learn."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    return Images(pixels, torch.from_numpy(bunch.target).long(), [str(name) for name in bunch.target_names])


def folder(path: pathlib.Path, size: int) -> Images:
    """The images below ``path``, one sub-folder a class, resized to size x size; grey if all of them are.

    Files that are no images, and classes with fewer than two images, are left out and named on stderr.
    """
    import PIL  # noqa: F401 (here, lest its absence be taken for an unreadable file)

    if not path.is_dir():
        raise Unusable(f"{path} is not a folder")
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise Unusable(f"{path} has no sub-folders: put the images of each class into one of its own")
    left_out: list[str] = []
    classes: list[tuple[str, list[Tensor]]] = []
    for entry in folders:
        found: list[Tensor] = []
        for file in sorted(file for file in entry.rglob("*") if file.is_file() and not file.name.startswith(".")):
            try:
                found.append(_read(file, size))
            except Exception as error:  # whatever a decoder makes of a broken file
                left_out.append(f"{file} (cannot be read: {' '.join(str(error).split())})")
        if len(found) >= 2:
            classes.append((entry.name, found))
        else:
            left_out.append(f"{entry} ({'one image' if found else 'no image'}; a class takes two or more)")
    for problem in left_out[:LISTED]:
        print(f"left out: {problem}", file=sys.stderr)
    if len(left_out) > LISTED:
        print(f"left out: {len(left_out) - LISTED} more", file=sys.stderr)
    if len(classes) < 4:
        raise Unusable(
            f"{path} has {len(classes)} classes with two or more images, and it takes 4: 2 to train on, 2 to hold out"
        )
    pixels = torch.stack([image for _, found in classes for image in found])
    if torch.equal(pixels, pixels[:, :1].expand_as(pixels)):
        pixels = pixels[:, :1].contiguous()
    sizes = torch.tensor([len(found) for _, found in classes])
    labels = torch.arange(len(classes)).repeat_interleave(sizes)
    return Images(pixels.float() / 255, labels, [name for name, _ in classes])


def _read(file: pathlib.Path, size: int) -> Tensor:
    """[3, size, size], uint8."""
    from PIL import Image, ImageOps

    with Image.open(file) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):  # more than 8 bits; converting would clip them
            grey = np.asarray(image, np.float64)
            top = 65535 if image.mode.startswith("I") else max(grey.max(), 1e-9)
            image = Image.fromarray((grey / top * 255).clip(0, 255).astype(np.uint8))
        image = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def split(labels: Tensor, unseen: Tensor, test_share: float, seed: int) -> Split:
    """All of the classes ``unseen``, and of each other class a random ``test_share`` for the test.

    A class too small to leave two images on each side goes into the training as a whole.
    """
    generator = torch.Generator().manual_seed(seed)
    train, seen = [], []
    for label in labels.unique().tolist():
        if label in unseen:
            continue
        members = (labels == label).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        count = round(test_share * len(members))
        if count < 2 or len(members) - count < 2:
            count = 0
        seen.append(members[:count])
        train.append(members[count:])
    return Split(torch.cat(train), torch.cat(seen), torch.isin(labels, unseen).nonzero().squeeze(1))


def hold_out(classes: int, share: float, seed: int) -> Tensor:
    """A random share of the classes, at least 2 of them, leaving at least 2."""
    count = min(max(2, round(share * classes)), classes - 2)
    return torch.randperm(classes, generator=torch.Generator().manual_seed(seed))[:count].sort().values


def describe(images: Images, split: Split, unseen: Tensor) -> str:
    """Who is trained on what, in words."""
    seen_classes = len(images.names) - len(unseen)
    return (
        f"{len(images.labels)} images of {len(images.names)} classes: {len(split.train)} of {seen_classes} classes to"
        f" train on, {len(split.seen)} others of these to test (seen),\n"
        f"{len(split.unseen)} of {len(unseen)} other classes (unseen: {_listed([images.names[i] for i in unseen])})"
    )


def _listed(names: list[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
