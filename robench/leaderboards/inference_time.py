"""How long one image takes: by one forward pass, and by votes of noisy copies. One table per machine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from robench.catalog import LeaderboardEntry
from robench.records import TimingSpec
from robench.store import Results, StoredTiming, file_name
from robench.tables import Cell, Column, Table, competition_ranks, natural


def inference_time(results: Results) -> list[Table]:
    """Return a table for every (device, threads) on which times were measured."""
    machines: dict[tuple[str, int], list[StoredTiming]] = defaultdict(list)
    for stored in results.timings:
        machines[stored.record.spec.device, stored.record.spec.threads].append(stored)
    return [build_table(device, threads, own, results) for (device, threads), own in sorted(machines.items())]


def build_table(device: str, threads: int, timings: Sequence[StoredTiming], results: Results) -> Table:
    """Return the table of one machine, the fastest answer first."""
    on = f"{device}, {threads} thread{'s' if threads > 1 else ''}"
    rows_of = sorted(timings, key=lambda t: (t.record.median, natural(t.record.spec.subject), t.record.spec.copies))
    rates = [1 / stored.record.median for stored in rows_of]
    return Table(
        name=file_name(f"inference-time-{device}-{threads}".replace(" ", "-").replace("(", "").replace(")", "")),
        title=f"Time to classify one image, {on}",
        caption="images one after the other, each alone",
        columns=tuple(_columns()),
        rows=tuple(
            (Cell(value=rank), *_cells(stored, timings, results))
            for stored, rank in zip(rows_of, competition_ranks(rates), strict=True)
        ),
        ranked_by="rate",
        reading=(
            "The clock runs from the image on the device to its class on the host. A vote puts all noisy copies "
            "through the network in one batch; their noise counts. One pass and the vote took turns in one process. A "
            "time does not depend on weights: rows that name an architecture have random ones.",
        ),
    )


def _columns() -> Iterator[Column]:
    fixed = [
        ("rank", "#", "rank", "The fastest answer first.", None),
        ("model", "Model or network", "model", "What was asked for.", None),
        ("decision", "Decides by", "label", "One forward pass, or the vote of noisy copies.", None),
        ("rate", "Images a second", "amount", "One over the median time.", None),
        ("median", "Median", "amount", "Seconds for one image, with the 95 % interval of the median.", "s"),
        ("first", "1st quartile", "amount", "A quarter of the images took less.", "s"),
        ("third", "3rd quartile", "amount", "A quarter of the images took more.", "s"),
        ("ratio", "Of one pass", "amount", "How often one pass would fit into it.", None),
        ("queries", "Images", "amount", "How many were timed.", None),
    ]
    for key, title, role, description, unit in fixed:
        yield Column(key=key, title=title, role=role, description=description, unit=unit)  # type: ignore[arg-type]


def _cells(stored: StoredTiming, timings: Sequence[StoredTiming], results: Results) -> tuple[Cell, ...]:
    record, spec = stored.record, stored.record.spec
    single = [t.record.median for t in timings if t.record.spec.copies == 1 and _same_network(t.record.spec, spec)]
    return (
        Cell(value=spec.subject, model=spec.subject if spec.subject in results.cards else None),
        Cell(value="one pass" if spec.copies == 1 else f"{spec.copies} noisy copies"),
        Cell(value=1 / record.median, low=1 / record.high, high=1 / record.low, n=record.queries, record=stored.path),
        Cell(
            value=record.median,
            low=record.low,
            high=record.high,
            n=record.queries,
            record=stored.path,
        ),
        *(Cell(value=quartile) for quartile in record.quartiles),
        Cell(value=record.median / single[0]) if single else Cell(),
        Cell(value=record.queries),
    )


def _same_network(one: TimingSpec, other: TimingSpec) -> bool:
    return (one.subject, one.architecture, one.input_shape) == (other.subject, other.architecture, other.input_shape)


ENTRY = LeaderboardEntry(
    name="inference-time",
    build=inference_time,
    summary="How long one image takes: one forward pass against votes of noisy copies.",
    source="table 2 of HeatSmoothing, arXiv:2010.02508",
)
