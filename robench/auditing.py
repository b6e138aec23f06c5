"""Does a record say what its rows say? Pages print records; what counts is their rows, which anybody can count.

This counts them a second time, on purpose not by the functions that summed the record up (Wilson's formula excepted):
an error there would pass its own audit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robench import catalog
from robench.records import CertificateRecord, Distances, EvalRecord, Proportion, Radii, TransferRecord
from robench.statistics import LEVEL, wilson

Rows = Mapping[str, NDArray[Any]]

#: Of records and rows that were made by the same arithmetic: what is left is the order of a sum.
_ROUNDING = 1e-9


def contradiction(record: EvalRecord | TransferRecord | CertificateRecord, rows: Rows) -> str | None:
    """Return the first thing that a complete record says and its rows do not, as one clause; None where all agrees.

    Looked at are the shares with both their intervals, the distances and radii, and whether the rows are possible: an
    example is robust only if it was right, falls only inside the ball, at a distance that is a number. Costs, notes and
    diagnostics are taken as they are, as is which of the members broke an example.
    """
    if not isinstance(record, TransferRecord) and record.status != "complete":
        return None
    found = _certificate(record, rows) if isinstance(record, CertificateRecord) else _attack(record, rows)
    return next(found, None)


def columns_of(record: EvalRecord | TransferRecord | CertificateRecord) -> tuple[str, ...]:
    """Return the columns that :func:`contradiction` looks at."""
    if isinstance(record, CertificateRecord):
        return ("example_id", "correct", "radius", "samples")
    shares = ("example_id", "attacked", "robust")
    if isinstance(record, TransferRecord):
        return shares
    norm = record.spec.threat.norm.lower()
    return (*shares, norm) if record.distances is None else (*shares, norm, "broken")


def _attack(record: EvalRecord | TransferRecord, rows: Rows) -> Iterator[str]:
    spec = record.spec.source if isinstance(record, TransferRecord) else record.spec
    attacked, robust = rows["attacked"], rows["robust"]
    yield from _counted("clean", record.clean, int(attacked.sum()), len(attacked))
    yield from _counted("robust", record.robust, int(robust.sum()), len(robust))
    if (robust & ~attacked).any():
        yield f"example {_first(rows, robust & ~attacked)} is robust and was wrong without an attack"
    if isinstance(record, TransferRecord):
        return
    fallen = attacked & ~robust
    length = rows[spec.threat.norm.lower()]
    if not fallen.any():
        yield from _equal("median distance", record.median_distance, None)
    else:
        impossible = fallen & ~(np.isfinite(length) & (length >= 0))
        if impossible.any():
            yield f"example {_first(rows, impossible)} fell at a distance of {length[impossible][0]}"
        outside = fallen & (length > spec.threat.reach)
        if catalog.is_bounded(spec.attack.entry) and outside.any():
            yield f"example {_first(rows, outside)} fell at {length[outside][0]:.6g}, outside {spec.threat}"
        yield from _equal("median distance", record.median_distance, float(np.median(length[fallen])))
    if record.distances is not None:
        yield from _distances(record.distances, rows, length)


def _distances(said: Distances, rows: Rows, length: NDArray[np.float64]) -> Iterator[str]:
    attacked = rows["attacked"]
    found = attacked & rows["broken"]
    impossible = found & ~(np.isfinite(length) & (length >= 0))
    if impossible.any():
        yield f"example {_first(rows, impossible)} was broken at a distance of {length[impossible][0]}"
    if (said.found, said.attacked) != (found.sum(), attacked.sum()):
        yield f"{said.found} of {said.attacked} were broken, by the rows {found.sum()} of {attacked.sum()}"
    reach = np.where(found, length, np.inf)[attacked]
    median = float(np.median(reach)) if len(reach) else np.inf
    yield from _equal("median of all distances", said.median, median if np.isfinite(median) else None)
    yield from _equal("mean distance", said.mean_found, float(length[found].mean()) if found.any() else None)


def _certificate(record: CertificateRecord, rows: Rows) -> Iterator[str]:
    correct, radius = rows["correct"], rows["radius"]
    yield from _counted("correct", record.correct, int(correct.sum()), len(correct))
    if not (radius >= 0).all():
        yield f"example {_first(rows, ~(radius >= 0))} has a radius of {radius[~(radius >= 0)][0]}"
    reached = np.where(correct, radius, 0.0)
    finite = reached[np.isfinite(reached)]
    yield from _equal("average radius", record.average_radius, float(finite.mean()) if len(finite) else 0.0)
    yield from _radii("correct", record.radii, radius[correct])
    yield from _radii("positive", record.positive_radii, radius[radius > 0])
    asked = record.spec.certificate.parameters
    if "sigma" in asked and "alpha" in asked:
        # Whatever the bound: all of n samples are hits with probability p^n, so none above alpha^(1/n) is valid.
        numbers, own = np.unique(np.maximum(rows["samples"], 1), return_inverse=True)
        ends = [asked["sigma"] * NormalDist().inv_cdf(asked["alpha"] ** (1 / n)) for n in numbers.tolist()]
        beyond = radius > np.array(ends)[own] * (1 + _ROUNDING)
        if beyond.any():
            yield (
                f"example {_first(rows, beyond)} has a radius of {radius[beyond][0]:.6g}, which "
                f"{rows['samples'][beyond][0]:,} samples at sigma {asked['sigma']:g} cannot show"
            )


def _radii(which: str, said: Radii | None, radius: NDArray[np.float64]) -> Iterator[str]:
    finite = radius[np.isfinite(radius)]
    if (said is None) != (not len(finite)):
        yield f"{'no radius is' if said is None else 'there are radii that are'} {which}, by the rows {len(finite)}"
    elif said is not None:
        yield from _equal(f"number of {which} radii", said.n, len(finite))
        for name, value in (
            ("mean", finite.mean()),
            ("median", np.median(finite)),
            ("std", finite.std()),
            ("maximum", finite.max()),
        ):
            yield from _equal(f"{name} of the {which} radii", getattr(said, name), float(value))


def _counted(name: str, said: Proportion, hits: int, n: int) -> Iterator[str]:
    if (said.successes, said.n) != (hits, n):
        yield f"{name} {said.successes} of {said.n}, by the rows {hits} of {n}"
    elif n:
        yield from _equal(f"{name} share", said.value, hits / n)
        for end, ours in zip(said.wilson, wilson(hits, n), strict=True):
            yield from _equal(f"Wilson bound of the {name} share", end, ours)
        low, high = said.clopper_pearson
        if not _is_tail(hits, n, low, above=True) or not _is_tail(hits, n, high, above=False):
            yield f"{name} {hits} of {n} with the Clopper-Pearson interval {low:.6g} to {high:.6g}, which is another's"


@functools.lru_cache(maxsize=4096)
def _is_tail(hits: int, n: int, p: float, *, above: bool) -> bool:
    """Tell whether `hits` or more (`above`), or as many or fewer, of n have the probability that ends the interval.

    The interval's own definition, summed term by term: scipy's quantiles are another way, and a second to import.
    """
    if hits == (0 if above else n):
        return p == (0.0 if above else 1.0)
    if not 0 < p < 1:
        return False
    terms = np.concatenate([[n * math.log1p(-p)], _ratios(n) + math.log(p) - math.log1p(-p)]).cumsum()
    tail = np.exp(terms[hits:] if above else terms[: hits + 1]).sum()
    return bool(abs(tail - (1 - LEVEL) / 2) < 1e-6)


@functools.lru_cache(maxsize=16)
def _ratios(n: int) -> NDArray[np.float64]:
    """Return log((n - i) / (i + 1)) for i from 0: how binomial coefficients follow each other."""
    i = np.arange(n, dtype=np.float64)
    return np.log(n - i) - np.log(i + 1)


def _equal(name: str, said: float | None, counted: float | None) -> Iterator[str]:
    if said is None or counted is None:
        if said is not counted:
            yield f"{name} {said}, by the rows {counted}"
    elif not abs(said - counted) <= _ROUNDING * max(1.0, abs(counted)):
        yield f"{name} {said:.6g}, by the rows {counted:.6g}"


def _first(rows: Rows, which: NDArray[np.bool_]) -> int:
    return int(rows["example_id"][which][0])
