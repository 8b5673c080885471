"""Line charts as SVG, for the report: no script, colours from the page's style.

Readable in light and dark (the page sets the custom properties --line, --ink, --muted, --grid), by
screen readers (a sentence says what the line does) and by pointing at it (each point's title).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 14, 30
_POINTS = 200  # drawn at most: more than there are pixels says nothing


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line: y over x, both rising to the right and up."""

    title: str
    x: Sequence[float]
    """Rising."""
    y: Sequence[float]
    """As many; what is not finite is left out."""
    x_name: str = "step"
    note: str = ""
    """One short line under the title: the unit, or which way is better."""


@dataclass(frozen=True)
class _Frame:
    """The scale of both axes, from values to pixels."""

    x_ticks: list[float]
    y_ticks: list[float]

    def across(self, value: float) -> float:
        low, high = self.x_ticks[0], self.x_ticks[-1]
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def up(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)


def chart(series: Series) -> str:
    """A <figure> with the line; empty if there are fewer than two finite points."""
    points = [(x, y) for x, y in zip(series.x, series.y, strict=True) if math.isfinite(y)]
    if len(points) < 2 or points[0][0] == points[-1][0]:
        return ""
    points = _thin(points)
    values = [y for _, y in points]
    frame = _Frame(
        ticks(points[0][0], points[-1][0], 4), ticks(min(values), max(values), 3, padded=True)
    )
    first, last = points[0], points[-1]
    summary = (
        f"{series.title}: {show(first[1])} at {series.x_name} {show(first[0])},"
        f" {show(last[1])} at {series.x_name} {show(last[0])};"
        f" lowest {show(min(values))}, highest {show(max(values))}"
    )
    note = f"<span class=note>{escape(series.note)}</span>" if series.note else ""
    return (
        f"<figure class=chart><figcaption>{escape(series.title)} {note}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role=img aria-label="{escape(summary)}">'
        f"{_axes(frame, series.x_name)}{_line(frame, points, series.x_name)}</svg></figure>"
    )


def ticks(low: float, high: float, count: int, *, padded: bool = False) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) about `count` of them.

    They lie around low .. high where `padded`; else the ends are low and high themselves.
    """
    if high <= low:
        high = low + (abs(low) * 0.1 or 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    if padded:
        start, end = math.floor(low / step), math.ceil(high / step)
        return [number * step for number in range(start, end + 1)]
    inner = [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
    margin = step * 0.4  # an end's label needs room
    return [low, *(each for each in inner if low + margin < each < high - margin), high]


def show(value: float) -> str:
    """Short, as on an axis: 12,000; 0.035; 1e-06."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return f"{value:.1e}".replace(".0e", "e")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of equal stretches where there are too many; the last point stays as it is."""
    size = -(-len(points) // _POINTS)
    if size == 1:
        return points
    parts = [points[at : at + size] for at in range(0, len(points) - 1, size)]
    means = [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]
    return [*means[:-1], points[-1]]


def _axes(frame: _Frame, x_name: str) -> str:
    parts = []
    for tick in frame.y_ticks:
        y, place = frame.up(tick), f'x="{_LEFT - 6}" y="{frame.up(tick) + 3.5:.1f}"'
        parts.append(
            f'<line class=grid x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f"<text class=tick {place} text-anchor=end>{show(tick)}</text>"
        )
    for number, tick in enumerate(frame.x_ticks):
        last = number == len(frame.x_ticks) - 1
        label = f"{x_name} {show(tick)}" if last else show(tick)
        anchor = "end" if last else "start" if number == 0 else "middle"
        parts.append(
            f'<text class=tick x="{frame.across(tick):.1f}" y="{_HEIGHT - 10}"'
            f" text-anchor={anchor}>{escape(label)}</text>"
        )
    return "".join(parts)


def _line(frame: _Frame, points: list[tuple[float, float]], x_name: str) -> str:
    """The path, its last value marked, and a target with a title around every point."""
    places = [(frame.across(x), frame.up(y)) for x, y in points]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    targets = "".join(
        f'<circle class=target cx="{cx:.1f}" cy="{cy:.1f}" r=6>'
        f"<title>{escape(x_name)} {show(x)}: {show(y)}</title></circle>"
        for (cx, cy), (x, y) in zip(places, points, strict=True)
    )
    end_x, end_y = places[-1]
    return (
        f'<path class=line d="{path}"/>'
        f'<circle class=end cx="{end_x:.1f}" cy="{end_y:.1f}" r=3.5 />{targets}'
    )
