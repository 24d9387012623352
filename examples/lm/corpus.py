"""Text as bytes: split into training and validation, and cut into batches."""

import pathlib
from typing import NamedTuple

import grain
import numpy as np

SHAKESPEARE = pathlib.Path(__file__).parents[1] / "data" / "shakespeare.txt"


class Corpus(NamedTuple):
    """Two contiguous stretches of one text, as uint8 tokens."""

    train: np.ndarray
    validation: np.ndarray


def split(text: bytes, validation_fraction: float = 0.1) -> Corpus:
    """Keeps the end of `text` for validation.

    Contiguous stretches, not random windows: neighbouring windows of one page would
    let a model that memorises look like one that generalises.
    """
    tokens = np.frombuffer(text, np.uint8)
    boundary = len(tokens) - round(len(tokens) * validation_fraction)
    return Corpus(tokens[:boundary], tokens[boundary:])


class Windows:
    """Windows of `length` inputs and, shifted by one token, `length` targets.

    A Grain data source. A window holds ``length + 1`` tokens and shares its last one
    with the next, so every token but the first is a target exactly once.
    """

    def __init__(self, tokens: np.ndarray, length: int):
        self._tokens = tokens
        self._length = length

    def __len__(self) -> int:
        return max(0, len(self._tokens) - 1) // self._length

    def __getitem__(self, index: int) -> np.ndarray:
        start = index * self._length
        return self._tokens[start : start + self._length + 1]


def batches(
    tokens: np.ndarray, length: int, batch_size: int, seed: int
) -> grain.MapDataset:
    """Shuffled training batches, uint8 of shape ``(batch_size, length + 1)``.

    Batch number `n` is ``batches(...)[n]``, a pure function of the seed and `n`: the
    step number is the whole state of the data iterator. The order is drawn anew in
    every epoch. A batch of 16 windows takes about 1 ms.
    """
    windows = grain.MapDataset.source(Windows(tokens, length))
    return windows.seed(seed).shuffle().repeat().batch(batch_size)


def evaluation_batches(
    tokens: np.ndarray, length: int, batch_size: int, limit: int
) -> np.ndarray:
    """Up to `limit` evenly spaced windows: ``(batches, batch_size, length + 1)``.

    A text with fewer windows than `batch_size` makes one smaller batch.
    """
    windows = Windows(tokens, length)
    count = min(limit, len(windows))
    batch_size = min(batch_size, count)
    count -= count % batch_size
    chosen = np.linspace(0, len(windows) - 1, count).astype(int)
    stacked = np.stack([windows[index] for index in chosen])
    return stacked.reshape(-1, batch_size, length + 1)
