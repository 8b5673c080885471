"""The picture of benchmarks/proof_cifar.py: accuracy by step over baselines, as SVG."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from byol_training.curves import ticks

Point = tuple[float, float]
"""Step, accuracy 0 .. 1."""
_WIDTH, _HEIGHT = 860, 460
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 230, 50, 60
_LINE_HEIGHT = 17


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One curve of the picture."""

    points: Sequence[Point]
    colour: str
    dashed: bool = False


def draw(title: str, steps: int, curves: Mapping[str, Curve], levels: Mapping[str, float]) -> str:
    """An SVG on white, readable wherever it is shown.

    Args:
        title: above it.
        steps: where the x axis ends.
        curves: by name.
        levels: baselines, lines all across, by name.
    """
    values = [y for curve in curves.values() for _, y in curve.points] + list(levels.values())
    y_ticks = ticks(min(values), max(values), 5, padded=True)
    low, high = y_ticks[0], y_ticks[-1]
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def across(step: float) -> float:
        return _LEFT + step / steps * (right - _LEFT)

    def up(accuracy: float) -> float:
        return bottom - (accuracy - low) / (high - low) * (bottom - _TOP)

    parts = [
        f'<path d="M{_LEFT} {up(tick):.1f}H{right}" stroke="#e2e2e2"/>'
        f'<text x="{_LEFT - 8}" y="{up(tick) + 4:.1f}" text-anchor="end">{100 * tick:.0f}%</text>'
        for tick in y_ticks
    ]
    parts += [
        f'<text x="{across(tick):.1f}" y="{bottom + 20}" text-anchor="middle">{tick:,.0f}</text>'
        for tick in ticks(0, steps, 5)
    ]
    ends: list[tuple[float, str, str]] = []
    for name, accuracy in levels.items():
        parts.append(
            f'<path d="M{_LEFT} {up(accuracy):.1f}H{right}" stroke="#777" stroke-dasharray="2 4"/>'
        )
        ends.append((up(accuracy), "#555", f"{name} {100 * accuracy:.1f}%"))
    for name, curve in curves.items():
        path = "L".join(f"{across(x):.1f} {up(y):.1f}" for x, y in curve.points)
        last_x, last_y = curve.points[-1]
        dash = ' stroke-dasharray="7 4"' if curve.dashed else ""
        parts.append(
            f'<path d="M{path}" fill="none" stroke="{curve.colour}" stroke-width="2.5"{dash}/>'
            f'<circle cx="{across(last_x):.1f}" cy="{up(last_y):.1f}" r="4" fill="{curve.colour}"/>'
        )
        ends.append((up(last_y), curve.colour, f"{name} {100 * last_y:.1f}%"))
    parts += [
        f'<text x="{right + 12}" y="{y + 4:.1f}" fill="{colour}">{escape(text)}</text>'
        for y, colour, text in _apart(ends)
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-size="13"'
        f' font-family="sans-serif" fill="#222"><rect width="{_WIDTH}" height="{_HEIGHT}"'
        f' fill="#fff"/><text x="{_LEFT}" y="26" font-size="16" font-weight="600">{escape(title)}'
        f'</text>{"".join(parts)}<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 14}"'
        ' text-anchor="middle">optimiser steps</text></svg>\n'
    )


def _apart(ends: list[tuple[float, str, str]]) -> list[tuple[float, str, str]]:
    """Labels from the top down, moved so that none covers another."""
    placed: list[tuple[float, str, str]] = []
    for y, colour, text in sorted(ends):
        if placed:
            y = max(y, placed[-1][0] + _LINE_HEIGHT)
        placed.append((y, colour, text))
    return placed
