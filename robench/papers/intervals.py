"""Arithmetic with numbers that are known as intervals, and conditions that may stay open.

A condition is true or false where every choice of values from the intervals makes it so, and None where the choice
matters; `both`, `either` and `negated` join such conditions by Kleene's three-valued logic.

Every operand is taken to vary by itself. An interval that occurs twice in an expression varies twice: `x - x` is not 0
but everything from `low - high` to `high - low`. A result may so be wider than need be, never too narrow: what is
decided is decided, and some of what is left open need not be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

#: A condition's answer; None is: it depends on which of their values the intervals have.
Truth = bool | None


@dataclass(frozen=True)
class Interval:
    """All numbers from `low` to `high`; either may be infinite."""

    low: float
    high: float

    def __add__(self, other: Number) -> Interval:
        b = as_interval(other)
        return _spanning(self.low + b.low, self.high + b.high)

    def __neg__(self) -> Interval:
        return Interval(-self.high, -self.low)

    def __sub__(self, other: Number) -> Interval:
        return self + -as_interval(other)

    def __rsub__(self, other: Number) -> Interval:
        return -self + other

    def __mul__(self, other: Number) -> Interval:
        b = as_interval(other)
        return _spanning(*(_product(x, y) for x in (self.low, self.high) for y in (b.low, b.high)))

    def __truediv__(self, other: Number) -> Interval:
        b = as_interval(other)
        if b.low == b.high == 0:
            raise ZeroDivisionError("division by zero")
        if b.low <= 0 <= b.high:
            return UNBOUNDED
        return self * Interval(1 / b.high, 1 / b.low)

    def __rtruediv__(self, other: Number) -> Interval:
        return as_interval(other) / self

    __radd__, __rmul__ = __add__, __mul__

    def __abs__(self) -> Interval:
        nearest = 0.0 if self.low <= 0 <= self.high else min(abs(self.low), abs(self.high))
        return Interval(nearest, max(abs(self.low), abs(self.high)))

    def __bool__(self) -> bool:
        """Raise TypeError: an interval is no condition, and what compares by truth, such as min, is not for it."""
        raise TypeError("an interval is no condition")

    def __lt__(self, other: Number) -> Truth:
        b = as_interval(other)
        return _decided(self.high < b.low, self.low >= b.high)

    def __le__(self, other: Number) -> Truth:
        b = as_interval(other)
        return _decided(self.high <= b.low, self.low > b.high)

    def __gt__(self, other: Number) -> Truth:
        return as_interval(other) < self

    def __ge__(self, other: Number) -> Truth:
        return as_interval(other) <= self


Number = float | Interval

UNBOUNDED = Interval(-math.inf, math.inf)


def as_interval(number: Number) -> Interval:
    """Return a number as an interval; an exact one has no width."""
    return number if isinstance(number, Interval) else Interval(number, number)


def least(*numbers: Number) -> Number:
    """Return the least of several numbers."""
    return _by_bounds(min, numbers)


def greatest(*numbers: Number) -> Number:
    """Return the greatest of several numbers."""
    return _by_bounds(max, numbers)


def square_root(number: Number) -> Number:
    """Return the square root of a number; of an interval that begins below 0, that of its part from 0 on."""
    if isinstance(number, Interval):
        return Interval(math.sqrt(max(number.low, 0.0)), math.sqrt(number.high))
    return math.sqrt(number)


def both(conditions: Iterable[Truth]) -> Truth:
    """Return whether all conditions are so."""
    found = list(conditions)
    return _decided(all(found), False in found)


def either(conditions: Iterable[Truth]) -> Truth:
    """Return whether any condition is so."""
    return negated(both(negated(condition) for condition in conditions))


def negated(condition: Truth) -> Truth:
    """Return whether a condition is not so."""
    return None if condition is None else not condition


def _decided(true: bool, false: bool) -> Truth:
    """Return a condition that is shown to be so, shown not to be, or neither."""
    return True if true else False if false else None


def _by_bounds(choose: Callable[[Iterable[float]], float], numbers: Iterable[Number]) -> Number:
    """Return min or max of several numbers, exact where all are."""
    given = list(numbers)
    exact = [number for number in given if not isinstance(number, Interval)]
    if len(exact) == len(given):
        return choose(exact)
    spans = [as_interval(number) for number in given]
    return Interval(choose(span.low for span in spans), choose(span.high for span in spans))


def _product(x: float, y: float) -> float:
    """Return the product of two bounds; an infinite one stands for all finite numbers, so that 0 times it is 0."""
    return 0.0 if x == 0 or y == 0 else x * y


def _spanning(*bounds: float) -> Interval:
    """Return the interval from the least to the greatest; all numbers where infinite bounds leave none."""
    return UNBOUNDED if any(map(math.isnan, bounds)) else Interval(min(bounds), max(bounds))
