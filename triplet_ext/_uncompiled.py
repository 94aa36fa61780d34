"""What torch.compile is to call as it is. Imported only while it compiles, since torch.compiler.disable imports a
second's worth of torch."""

from __future__ import annotations

import torch

from . import _hardest

hardest_triplets = torch.compiler.disable(
    _hardest.hardest_triplets, reason="hard_triplet_mining of triplet_ext runs uncompiled"
)
