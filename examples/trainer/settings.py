"""Fields of a dataclass that check their own values.

A field is declared with the values that it accepts:

    steps: int = setting(400, Whole(1))

The dataclass calls `check_settings` in its `__post_init__`. A flag of the command line
takes its parser and its choices from the same declaration.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from trainer.errors import UsageError

_FLOAT32 = np.finfo(np.float32)


@dataclasses.dataclass(frozen=True)
class Whole:
    """Accepts whole numbers from `low` to `high`, by default those of an int32."""

    low: int
    high: int = 2**31 - 1

    def parse(self, text: str) -> int:
        """Converts the text of a flag; raises ValueError if it is not accepted."""
        try:
            value = int(text)
        except ValueError:
            value = text
        return self.check(value, text)

    def check(self, value: Any, given: Any = None) -> int:
        """Returns `value`; raises ValueError if it is not accepted.

        The message shows `given`, the text that was converted to `value`, if any.
        """
        is_whole = type(value) is int
        if not is_whole or not self.low <= value <= self.high:
            too_large = is_whole and value > self.high
            bound = f"<= {self.high}" if too_large else f">= {self.low}"
            shown = value if given is None else given
            raise ValueError(f"must be a whole number {bound}, not {shown!r}")
        return value


@dataclasses.dataclass(frozen=True)
class Real:
    """Accepts finite numbers in [low, high], or in (low, high].

    Numbers beyond the range of float32 would be infinite in the training step. Numbers
    closer to 0 than its smallest normal number would be 0.
    """

    low: float = 0.0
    high: float = math.inf
    exclude_low: bool = False

    def parse(self, text: str) -> float:
        """Converts the text of a flag; raises ValueError if it is not accepted."""
        try:
            value = float(text)
        except ValueError:
            value = text
        return self.check(value, text)

    def check(self, value: Any, given: Any = None) -> float:
        """Returns `value`; raises ValueError if it is not accepted.

        The message shows `given`, the text that was converted to `value`, if any.
        """
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        seen = _as_float32(value) if is_number else math.nan
        if (
            not math.isfinite(seen)
            or not self.low <= value <= self.high
            or (self.exclude_low and not seen > self.low)
        ):
            bound = f"{'>' if self.exclude_low else '>='} {self.low:g}"
            if self.high < math.inf:
                bound += f" and <= {self.high:g}"
            shown = value if given is None else given
            note = ""
            if is_number and abs(value) < math.inf and seen != value:
                note = f", which is {seen:g} in float32"
            raise ValueError(f"must be a finite number {bound}, not {shown!r}{note}")
        return value


def _as_float32(value: float) -> float:
    """Returns a number as float32 arithmetic sees it: subnormal numbers are 0."""
    # Comparisons are exact for whole numbers that no float can hold.
    if abs(value) < float(_FLOAT32.tiny):
        return 0.0
    if abs(value) <= float(_FLOAT32.max):
        return value
    return math.inf if value > 0 else -math.inf


@dataclasses.dataclass(frozen=True)
class OneOf:
    """Accepts one of some names."""

    names: tuple[str, ...]

    def check(self, value: Any) -> str:
        """Returns `value`; raises ValueError if it is not accepted."""
        if value not in self.names:
            raise ValueError(f"must be one of {', '.join(self.names)}, not {value!r}")
        return value


@dataclasses.dataclass(frozen=True)
class Text:
    """Accepts any text that could be a file's name or a flag."""

    def check(self, value: Any) -> str:
        """Returns `value`; raises ValueError if it is not accepted."""
        if not isinstance(value, str):
            raise ValueError(f"must be a text, not {value!r}")
        if "\0" in value:
            raise ValueError(f"must be a text without zero bytes, not {value!r}")
        return value


@dataclasses.dataclass(frozen=True)
class Texts:
    """Accepts one or more texts, as a tuple."""

    def check(self, value: Any) -> tuple[str, ...]:
        """Returns `value`; raises ValueError if it is not accepted."""
        is_tuple = isinstance(value, tuple) and len(value) > 0
        if not is_tuple or not all(isinstance(text, str) for text in value):
            raise ValueError(f"must be one or more names, not {value!r}")
        return value


@dataclasses.dataclass(frozen=True)
class Switch:
    """Accepts True or False."""

    def check(self, value: Any) -> bool:
        """Returns `value`; raises ValueError if it is not accepted."""
        if type(value) is not bool:
            raise ValueError(f"must be true or false, not {value!r}")
        return value


def setting(default: Any, accepted: Any) -> Any:
    """Declares a field of a dataclass.

    A default of None is accepted as well. A field whose default is
    `dataclasses.MISSING` has none.
    """
    return dataclasses.field(default=default, metadata={"accepted": accepted})


def declared(dataclass: Any) -> dict[str, dataclasses.Field]:
    """Returns the fields of a dataclass that were declared with `setting`."""
    fields = dataclasses.fields(dataclass)
    return {field.name: field for field in fields if "accepted" in field.metadata}


def check_settings(config: Any) -> None:
    """Checks every setting of a dataclass.

    Raises:
      UsageError: If a value is not accepted.
    """
    for name, field in declared(config).items():
        value = getattr(config, name)
        if value is None and field.default is None:
            continue
        if isinstance(value, jax.core.Tracer):
            continue  # a compiled program may take a setting as an argument
        try:
            field.metadata["accepted"].check(value)
        except (TypeError, ValueError) as error:
            raise UsageError(f"{name} {error}") from error
