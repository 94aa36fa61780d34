"""How large: of a report, and of a rehearsal."""

from __future__ import annotations

from dataclasses import dataclass

from ..timing import Budget

Shape = tuple[int, int]


@dataclass(frozen=True)
class Sizes:
    small: tuple[int, ...]  # batch sizes of the grid, in two stages
    big: tuple[int, ...]
    widths: tuple[int, ...]
    explicit: tuple[Shape, ...]
    compiled: tuple[tuple[Shape, str], ...]  # and a precision's name; each costs a compilation
    launches: tuple[Shape, ...]
    kernels: tuple[Shape, ...]
    accuracy: tuple[Shape, ...]
    exact: tuple[Shape, ...]  # on either side of where the tiles begin
    strategies: tuple[Shape, ...]
    integers: tuple[Shape, ...]  # of strategies, against float64
    repeated: tuple[Shape, ...]
    captured: tuple[Shape, ...]
    runs: int
    copy_bytes: int
    matmul: int
    budget: Budget  # of a comparison
    slow: float  # seconds of one call from which on a side is not compared


_32768 = (32768, 128), (32768, 512)
FULL = Sizes(
    small=(128, 1024, 4096),
    big=(32768, 131072),
    widths=(128, 512, 2048),
    explicit=((65536, 128), (1 << 20, 128)),
    compiled=(
        ((1024, 128), "float32 highest"),
        ((32768, 128), "bfloat16"),
        ((32768, 512), "bfloat16"),
        ((4096, 128), "float32 highest"),
        ((128, 128), "float32 highest"),
        ((32768, 128), "float32 highest"),
        ((1024, 128), "bfloat16"),
        ((4096, 128), "bfloat16"),
    ),
    launches=((128, 128), (1024, 128)),
    kernels=_32768,
    accuracy=((4096, 128), (4096, 512)),
    exact=((700, 33), (5000, 32)),
    strategies=((4096, 128), (32768, 128)),
    integers=((700, 33), (1500, 130)),
    repeated=((1024, 128), (4096, 128), (8192, 512)),
    captured=((128, 128), (1024, 128), (4096, 128)),
    runs=20,
    copy_bytes=1 << 30,
    matmul=8192,
    budget=Budget(0.25, at_least=5, at_most=40, limit=4.0),
    slow=5.0,
)
REHEARSAL = Sizes(
    small=(16,),
    big=(32,),
    widths=(8,),
    explicit=((64, 8),),
    compiled=(((16, 8), "float32 highest"),),
    launches=((16, 8),),
    kernels=((32, 8),),
    accuracy=((64, 8),),
    exact=((60, 9),),
    strategies=((32, 8),),
    integers=((40, 9),),
    repeated=((32, 8),),
    captured=((16, 8),),
    runs=3,
    copy_bytes=1 << 16,
    matmul=32,
    budget=Budget(0.0, at_least=1, at_most=2),
    slow=5.0,
)
