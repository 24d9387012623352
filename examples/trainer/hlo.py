"""The collectives of a compiled program, read from its HLO text."""

import math
import re
from typing import NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8}
COLLECTIVE = re.compile(
    r"= (.*?) ((?:ragged-)?all-[a-z-]+?|reduce-scatter|collective-[a-z-]+?)"
    r"(-start|-done)?\("
)
ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


class Array(NamedTuple):
    """Dtype and shape of one result."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * BYTES.get(self.dtype, 4)


class Collective(NamedTuple):
    """One collective operation, such as an all-reduce, and its results."""

    kind: str
    results: tuple[Array, ...]


def collectives(text: str) -> list[Collective]:
    """Returns the collectives in the text of a compiled program, in order."""
    found = []
    for result, kind, part in COLLECTIVE.findall(text):
        if part == "-done":  # the same operation as the -start before it
            continue
        arrays = tuple(
            Array(dtype, tuple(int(n) for n in shape.split(",") if n))
            for dtype, shape in ARRAY.findall(result)
        )
        if part and kind in ("all-gather", "collective-permute"):
            arrays = arrays[len(arrays) // 2 :]  # the first half are the operands
        found.append(Collective(kind, arrays))
    return found
