"""The triplet loss with online mining, in memory that grows with the batch and not with its square."""

__version__ = "0.1.0"

from . import functional
from ._info import build_info, explain
from .functional import TripletStats
from .losses import TripletLoss, TripletMarginLoss
from .memory import MemoryBank
from .mining import Mining, Triplets, hard_triplet_mining, mine

__all__ = [
    "MemoryBank",
    "Mining",
    "TripletLoss",
    "TripletMarginLoss",
    "TripletStats",
    "Triplets",
    "build_info",
    "explain",
    "functional",
    "hard_triplet_mining",
    "mine",
]
