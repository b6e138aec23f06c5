"""The papers' figures on the papers' pages: panels of numbers become drawings, and a CSV with every number drawn."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from robench.catalog import DrawingEntry
from robench.panels import Axis, Fallen, HeatMap, Origin, Panel, Plot, Samples, Series, Spread, Spreads
from robench.papers.archive import Archive
from robench.papers.figures import Evidence, Missing, PaperFigure, drawing_settings, load_figure
from robench.reporting.covariance import heat_picture
from robench.reporting.curves import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Tick, round_bounds
from robench.reporting.gallery import Gallery, fallen_rows, gallery
from robench.reporting.pictures import Pictures, address, picture
from robench.store import Results, StoredCard

#: Different looks of lines; each differs from every other by its colour and by its dashes.
_LOOKS = 8
#: Height of a group of a plot of spreads.
_GROUP = 34.0
#: Marks and pieces that one drawing can bear; the file has all.
_DENSEST = 4000

_CSV_COLUMNS = ("panel", "series", "x_title", "x", "y_title", "y", "low", "high", "n", "model", "record")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One series in the drawing's units."""

    title: str
    look: int
    form: str
    points: str = ""
    """Of lines and areas."""
    dots: tuple[tuple[float, float], ...] = ()
    pieces: str = ""
    """Of unjoined lines: a path."""
    bars: tuple[tuple[float, float, float], ...] = ()
    """Intervals: x, and the y of both ends."""
    hollow: bool = False
    n: int | None = None
    """How many images it is of."""


@dataclass(frozen=True, kw_only=True)
class RuleShape:
    """A line across the drawing."""

    title: str
    x: float | None
    y: float | None


@dataclass(frozen=True, kw_only=True)
class SpreadShape:
    """A group of a plot of spreads in the drawing's units."""

    title: str
    y: float
    low: float
    left: float
    mean: float
    median: float
    right: float
    high: float
    text: str
    hollow: bool


@dataclass(frozen=True, kw_only=True)
class Sketch:
    """A panel as it is drawn: one of the kinds of content, and what a reader who does not see it must know."""

    title: str
    described: str
    kind: str
    """`plot`, `spreads`, `heat`, `samples` or `fallen`."""
    shapes: tuple[Shape, ...] = ()
    rules: tuple[RuleShape, ...] = ()
    groups: tuple[SpreadShape, ...] = ()
    x_ticks: tuple[Tick, ...] = ()
    y_ticks: tuple[Tick, ...] = ()
    x_title: str = ""
    y_title: str = ""
    height: float = HEIGHT
    square: bool = False
    pictures: tuple[tuple[str, str], ...] = ()
    """(address, caption)."""
    caption: str = ""
    gallery: Gallery | None = None


@dataclass(frozen=True, kw_only=True)
class ShownFigure:
    """A figure with everything that its place on the page needs."""

    name: str
    figure: PaperFigure
    computed: bool
    """An illustration: nothing of it was measured."""
    sketches: tuple[Sketch, ...] = ()
    missing: tuple[Missing, ...] = ()
    cost: str | None = None
    """What it takes to make what is missing, at most."""
    used: dict[str, StoredCard] = field(default_factory=dict)
    records: tuple[Path, ...] = ()
    csv: str | None = None

    @property
    def scales(self) -> list[str]:
        """Return what is smaller than in the paper, each once."""
        return list(dict.fromkeys(card.card.scale for card in self.used.values() if card.card.scale))

    @property
    def lacking(self) -> list[tuple[list[str], str, tuple[str, ...]]]:
        """Return what is missing, those together that lack the same: names, why, commands."""
        groups: dict[tuple[str, tuple[str, ...]], dict[str, list[str]]] = {}
        for missing in self.missing:
            panels = groups.setdefault((missing.reason, missing.commands), {})
            panels.setdefault(missing.panel, []).append(missing.line)
        return [
            ([f"{panel}: {'; '.join(lines)}" if panel else "; ".join(lines) for panel, lines in panels.items()], *key)
            for key, panels in groups.items()
        ]

    @property
    def smaller(self) -> list[str]:
        """Return the commands that make what is missing at reduced scale, each once."""
        return list(dict.fromkeys(missing.smaller for missing in self.missing if missing.smaller))

    @property
    def asks_more(self) -> bool:
        """Tell whether these commands make models only."""
        return any(missing.smaller and missing.model_only for missing in self.missing)

    @property
    def state(self) -> str:
        """Return in a word or two how much of it is there."""
        if self.computed:
            return "computed"
        if self.figure.beside:
            return f"with {self.figure.beside}"
        if not self.sketches:
            return "not measured"
        return "in part" if self.missing or self.figure.needs else "drawn"


def show_figure(name: str, results: Results, archive: Archive, pictures: Pictures) -> ShownFigure:
    """Return a figure with what there is of it; raise UserError for damaged records."""
    figure = load_figure(name)
    if figure.drawing is None:
        return ShownFigure(name=name, figure=figure, computed=False)
    plugin, parameters = drawing_settings(figure)
    evidence = Evidence(figure, results, archive, reports=pictures.root)
    panels: list[Panel] = plugin.load().draw(evidence, **parameters)
    sketches, kept = [], []
    for panel in panels:
        if isinstance(panel, Fallen):
            shown = gallery(panel.record, panel.rows, pictures)
            if shown is None:
                evidence.missing.append(_no_images(panel))
                continue
            sketches.append(_fallen(panel, shown))
        else:
            sketches.append(sketch(panel))
        kept.append(panel)
    origins = [origin for panel in kept for origin in origins_of(panel)]
    drawn = {origin.model for origin in origins}
    return ShownFigure(
        name=name,
        figure=figure,
        computed=not plugin.facts.get("measures", DrawingEntry.measures),
        sketches=tuple(sketches),
        missing=tuple(evidence.missing),
        cost=evidence.cost,
        used={model: card for model, card in evidence.used.items() if model in drawn},
        records=tuple(dict.fromkeys(origin.record for origin in origins if origin.record)),
        csv=figure_csv(kept) if any(not isinstance(panel, Samples | Fallen) for panel in kept) else None,
    )


def _no_images(panel: Fallen) -> Missing:
    spec, fell = panel.record.spec, len(fallen_rows(panel.rows)) > 0
    reason = "its adversarial images were not kept" if fell else "no image fell"
    words = f"robench eval --model {spec.model.id} --attack {spec.attack.title} --threat {spec.threat}"
    return Missing(
        panel="", line=panel.title, reason=reason, commands=(f"{words} --save-adversarials",) if fell else ()
    )


def origins_of(panel: Panel) -> list[Origin]:
    """Return where a panel's numbers are from."""
    match panel:
        case Plot():
            found = [series.origin for series in panel.series]
        case Spreads():
            found = [group.origin for group in panel.groups]
        case HeatMap() | Fallen():
            found = [panel.origin]
        case Samples():
            found = []
    return [origin for origin in found if origin is not None]


def sketch(panel: Plot | Spreads | HeatMap | Samples) -> Sketch:
    """Return a panel as it is drawn."""
    match panel:
        case Plot():
            return _plot(panel)
        case Spreads():
            return _spreads(panel)
        case HeatMap():
            return _heat(panel)
        case Samples():
            return _samples(panel)


def _bounds(axis: Axis, values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of an axis: those that it has, else round numbers around the data."""
    finite = [value for value in (*values, *axis.includes) if math.isfinite(value)] or [0.0, 1.0]
    low = min(finite) if axis.low is None else axis.low
    high = max(finite) if axis.high is None else axis.high
    if high <= low:
        return low - 0.5, low + 0.5
    if axis.low is not None and axis.high is not None:
        return low, high
    start, end = round_bounds(low, high)
    return (low if axis.low is not None else start), (high if axis.high is not None else end)


def _ticks(axis: Axis, bounds: tuple[float, float], place: Any, *, whole: bool = False) -> tuple[Tick, ...]:
    if not axis.ticks:
        return ()
    low, high = bounds
    values = sorted({round(v) for v in np.linspace(low, high, 5)} if whole else set(np.linspace(low, high, 5).tolist()))
    return tuple(Tick(place(v), f"{v + 0.0:.4g}".replace("-", "−")) for v in values)


def _plot(panel: Plot) -> Sketch:
    square = not panel.x.ticks and not panel.y.ticks
    height = WIDTH if square else HEIGHT
    ends = [rule.x for rule in panel.rules if rule.x is not None]
    x_bounds = _bounds(panel.x, [*(v for s in panel.series for v in s.x), *ends])
    y_bounds = _bounds(panel.y, [v for s in panel.series for v in (*s.y, *s.low, *s.high)])
    left, bottom = (RIGHT, RIGHT) if square else (LEFT, BOTTOM)

    def across(x: float) -> float:
        low, high = x_bounds
        return left + (WIDTH - left - RIGHT) * (x - low) / (high - low)

    def up(y: float) -> float:
        low, high = y_bounds
        return height - bottom - (height - TOP - bottom) * (y - low) / (high - low)

    shapes = tuple(
        _shape(series, look, across, up, end=x_bounds[1], base=max(0.0, y_bounds[0]))
        for look, series in enumerate(panel.series)
    )
    whole = all(float(x).is_integer() for s in panel.series for x in s.x) and x_bounds[1] - x_bounds[0] >= 1
    lines = [f"{s.title}{f', n {s.n:,}' if s.n else ''}: {_said(s)}" for s in panel.series]
    return Sketch(
        title=panel.title,
        described=f"{panel.y.title or 'y'} over {panel.x.title or 'x'}. " + "; ".join(lines) + ".",
        kind="plot",
        shapes=shapes,
        rules=tuple(
            RuleShape(
                title=rule.title,
                x=None if rule.x is None else across(rule.x),
                y=None if rule.y is None else up(rule.y),
            )
            for rule in panel.rules
        ),
        x_ticks=_ticks(panel.x, x_bounds, across, whole=whole),
        y_ticks=_ticks(panel.y, y_bounds, up),
        x_title=panel.x.title,
        y_title=panel.y.title,
        height=height,
        square=square,
    )


def _said(series: Series) -> str:
    if not series.x:
        return "nothing"
    if series.form in {"dots", "segments"}:
        return f"{len(series.x)} points"
    return f"from {series.y[0]:.4g} at {series.x[0]:.4g} to {series.y[-1]:.4g} at {series.x[-1]:.4g}"


def _shape(series: Series, look: int, across: Any, up: Any, *, end: float, base: float) -> Shape:
    places = [(across(x), up(y)) for x, y in zip(series.x, series.y, strict=True)]
    made = Shape(
        title=series.title,
        look=(look if series.look is None else series.look) % _LOOKS,
        form=series.form,
        hollow=series.hollow,
        n=series.n,
    )
    if series.form == "dots":
        return replace(made, dots=tuple(places[:_DENSEST]))
    if series.form == "segments":
        pairs = zip(places[::2], places[1::2], strict=True)
        return replace(made, pieces="".join(f"M{a[0]:.1f} {a[1]:.1f}L{b[0]:.1f} {b[1]:.1f}" for a, b in pairs))
    if series.form == "step":
        places = _stairs(series, across, up, end)
    elif series.form == "area" and places:
        places = [(places[0][0], up(base)), *places, (places[-1][0], up(base))]
    low = [up(v) for v in series.low]
    high = [up(v) for v in series.high]
    bars = tuple((x, a, b) for (x, _), a, b in zip(places, low, high, strict=True)) if low else ()
    dots = tuple(places) if bars or (series.form == "line" and len(places) <= 16) else ()
    return replace(made, points=" ".join(f"{x:.1f},{y:.1f}" for x, y in places), bars=bars, dots=dots)


def _stairs(series: Series, across: Any, up: Any, end: float) -> list[tuple[float, float]]:
    """Return the corners of a step function up to the end of the axis."""
    corners: list[tuple[float, float]] = []
    for x, y in zip(series.x, series.y, strict=True):
        if x > end:
            break
        if corners:
            corners.append((across(x), corners[-1][1]))
        corners.append((across(x), up(y)))
    return [*corners, (across(end), corners[-1][1])] if corners else []


def _spreads(panel: Spreads) -> Sketch:
    highest = max(max(g.quantiles[-1], g.mean + g.std) for g in panel.groups)
    bounds = _bounds(panel.x, [0.0, highest])
    height = _GROUP * len(panel.groups) + BOTTOM

    def across(x: float) -> float:
        low, high = bounds
        return 2 * RIGHT + (WIDTH - 3 * RIGHT) * (min(max(x, low), high) - low) / (high - low)

    groups = tuple(
        SpreadShape(
            title=group.title,
            y=_GROUP * (place + 0.7),
            low=across(group.quantiles[0]),
            left=across(group.mean - group.std),
            mean=across(group.mean),
            median=across(group.quantiles[2]),
            right=across(group.mean + group.std),
            high=across(group.quantiles[-1]),
            text=f"{group.mean:.2f} ± {group.std:.2f}, n {group.n:,}",
            hollow=group.hollow,
        )
        for place, group in enumerate(panel.groups)
    )
    return Sketch(
        title=panel.title,
        described="; ".join(f"{g.title}: mean {g.mean:.3g}, deviation {g.std:.3g}, n {g.n:,}" for g in panel.groups),
        kind="spreads",
        groups=groups,
        x_ticks=_ticks(panel.x, bounds, across),
        x_title=panel.x.title,
        height=height,
    )


def _heat(panel: HeatMap) -> Sketch:
    largest = float(np.abs(panel.values).max())
    picture = heat_picture(panel.values / largest if largest > 0 else panel.values)
    return Sketch(
        title=panel.title,
        described=f"{panel.title}: heat map, {panel.caption}",
        kind="heat",
        pictures=((f"data:image/png;base64,{picture}", ""),),
        caption=panel.caption,
    )


def _samples(panel: Samples) -> Sketch:
    shown = tuple(
        (address(picture(pixels)), words) for pixels, words in zip(panel.pictures, panel.captions, strict=True)
    )
    return Sketch(title=panel.title, described=panel.title, kind="samples", pictures=shown)


def _fallen(panel: Fallen, shown: Gallery) -> Sketch:
    return Sketch(title=panel.title, described=panel.title, kind="fallen", gallery=shown)


def figure_csv(panels: Sequence[Panel]) -> str:
    """Return every number that is drawn, a row for each point, with the model and the record that it is of.

    Heat maps have a row for each of their rows, or the shorter table that says the same; pictures have none.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    maps = [panel for panel in panels if isinstance(panel, HeatMap) and not panel.header]
    if maps:
        widest = max(panel.values.shape[1] for panel in maps)
        writer.writerow(["panel", "model", "row", *range(widest)])
        for heat in maps:
            model = _from(heat.origin)[0]
            for place, row in enumerate(heat.values.tolist()):
                writer.writerow([heat.title, model, place, *(f"{value:.3g}" for value in row)])
        return text.getvalue()
    writer.writerow(_CSV_COLUMNS)
    for panel in panels:
        writer.writerows(_csv_rows(panel))
    return text.getvalue()


def _csv_rows(panel: Panel) -> Iterator[list[object]]:
    match panel:
        case Plot():
            for series in panel.series:
                blank = [None] * len(series.x)
                pairs = zip(series.x, series.y, series.low or blank, series.high or blank, strict=True)
                for x, y, low, high in pairs:
                    # What was computed comes out the same on every machine to so many digits only.
                    digits = 10 if series.origin else 6
                    head = [panel.title, series.title, panel.x.title, _exact(x, digits), panel.y.title]
                    head.append(_exact(y, digits))
                    yield [*head, _exact(low), _exact(high), series.n, *_from(series.origin)]
        case Spreads():
            for group in panel.groups:
                for name, value in _statistics(group):
                    head = [panel.title, group.title, "statistic", name, panel.x.title, _exact(value)]
                    yield [*head, None, None, group.n, *_from(group.origin)]
        case HeatMap():
            for first, *others in panel.rows:
                for name, value in zip(panel.header[1:], others, strict=True):
                    head = [panel.title, name, panel.header[0], _exact(first, 6), "value", _exact(value, 6)]
                    yield [*head, None, None, None, *_from(panel.origin)]
        case _:
            return


def _statistics(group: Spread) -> list[tuple[str, float]]:
    names = ("5 %", "25 %", "median", "75 %", "95 %")
    return [("mean", group.mean), ("std", group.std), *zip(names, group.quantiles, strict=True)]


def _exact(value: float | None, digits: int = 10) -> object:
    return None if value is None else f"{value:.{digits}g}"


def _from(origin: Origin | None) -> list[object]:
    if origin is None:
        return [None, None]
    return [origin.model, origin.record.name.split(".")[0] if origin.record else None]
