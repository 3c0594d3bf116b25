"""Charts as inline SVG: lines with a smoothed overlay, stacked areas, the little slope of a headline number."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from vrlt_fast.report.markup import esc
from vrlt_fast.report.numbers import DASH, MINUS, short

WIDTH, HEIGHT = 400, 196
LEFT, RIGHT, TOP, BOTTOM = 42, 10, 10, 28
_POINTS = 300

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A named line; ``colour`` is the name of a CSS variable, ``points`` are (x, y) with x ascending, both finite."""

    name: str
    colour: str
    points: Sequence[Point]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Exponential average without start-up bias, over about a twentieth of the points; short series stay as is."""
    span = len(points) / 20
    if span < 1:
        return list(points)
    keep = 1 - 1 / span if span > 1 else 0.0
    total = weight = 0.0
    result = []
    for x, y in points:
        total, weight = keep * total + (1 - keep) * y, keep * weight + (1 - keep)
        result.append((x, total / weight))
    return result


def thinned(points: Sequence[Point], most: int = _POINTS) -> list[Point]:
    """At most about ``most`` points: of each bucket the lowest and the highest, so that spikes stay visible."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / (most / 2))
    result = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        result += sorted({min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])})
    return result


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About ``count`` round numbers (1, 2, 2.5 or 5 times a power of ten apart) that lie within [low, high]."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * min((m for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999), default=10)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class _Scale:
    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)

    def path(self, points: Sequence[Point]) -> str:
        return "M" + "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points)


def _scale(series: Sequence[Series], bounds: tuple[float | None, float | None]) -> _Scale:
    xs = [x for line in series for x, _ in line.points]
    ys = [y for line in series for _, y in line.points]
    ends = [end for end in bounds if end is not None]
    low, high = min(ys + ends), max(ys + ends)
    flat = high - low < 1e-12 + 1e-6 * abs(high)
    pad = 0.5 * (abs(high) or 1) if flat else 0.06 * (high - low)
    low, high = (low if low == bounds[0] else low - pad), (high if high == bounds[1] else high + pad)
    x0, x1 = min(xs), max(xs)
    return _Scale(x0, x1 if x1 > x0 else x0 + 1, low, high)


def _value(value: float, percent: bool) -> str:
    return f"{round(100 * value, 2):.3g}%" if percent else short(value).replace("-", MINUS, 1)


def _axes(scale: _Scale, x_label: str, percent: bool) -> str:
    parts = []
    marks = ticks(scale.y0, scale.y1)
    for value in marks:
        y = scale.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{_value(value, percent)}</text>')
    base = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    for value in ticks(scale.x0, scale.x1, 5):
        if x_label == "step" and value != int(value):
            continue
        x = scale.x(value)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 3}"/>')
        if x < WIDTH - RIGHT - 44:
            parts.append(f'<text x="{x:.1f}" y="{base + 15}" text-anchor="middle">{value:g}</text>')
    parts.append(f'<text class="unit" x="{WIDTH - RIGHT}" y="{base + 15}" text-anchor="end">{esc(x_label)} →</text>')
    return "".join(parts)


def _hover(scale: _Scale, series: Sequence[Series], percent: bool, x_label: str) -> str:
    lines = [
        {"n": line.name, "c": line.colour, "p": [[round(x, 4), float(f"{y:.4g}")] for x, y in line.points]}
        for line in series
    ]
    box = [LEFT / WIDTH, (WIDTH - RIGHT) / WIDTH]
    return esc(
        json.dumps({"label": x_label, "x": [scale.x0, scale.x1], "box": box, "pct": percent, "s": lines}), limit=10**9
    )


def _figure(title: str, unit: str, body: str, legend: str, hover: str) -> str:
    unit = f' <span class="unit">{esc(unit)}</span>' if unit else ""
    return (
        f'<figure class="chart" data-chart="{hover}"><figcaption><b>{esc(title)}</b>{unit}</figcaption>'
        f'<div class="plot"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{esc(title)}">{body}'
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg></div>'
        f'<div class="legend">{legend}</div></figure>'
    )


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    unit: str = "",
    x_label: str = "step",
    bounds: tuple[float | None, float | None] = (None, None),
    percent: bool = False,
    smooth: bool = True,
    read_at: float | None = None,
) -> str:
    """A figure: faint raw lines under smoothed ones, gridlines, and a legend with last value, minimum and maximum.

    ``bounds`` are values that the y axis includes, and ends at where no point lies beyond; ``read_at`` marks the value
    at that x instead of the last. Series without points are left out; "" when none has any.
    """
    series = [line for line in series if line.points]
    if not series:
        return ""
    scale = _scale(series, bounds)
    body, legend, drawn = [_axes(scale, x_label, percent)], [], []
    for line in series:
        even = smoothed(line.points) if smooth else list(line.points)
        raw = Series(line.name, line.colour, thinned(line.points))
        drawn.append(raw)
        style = f'style="--c:var(--{line.colour})"'
        if smooth and len(line.points) >= 20:
            body.append(f'<path class="raw" {style} d="{scale.path(raw.points)}"/>')
        body.append(f'<path class="line" {style} d="{scale.path(thinned(even))}"/>')
        x, last = even[-1] if read_at is None else min(even, key=lambda point: abs(point[0] - read_at))
        body.append(f'<circle class="dot" {style} cx="{scale.x(x):.1f}" cy="{scale.y(last):.1f}" r="2.6"/>')
        ys = [y for _, y in line.points]
        low, high, now = (_value(v, percent) for v in (min(ys), max(ys), last))
        range_text = f'<span class="range">{low} {DASH} {high}</span>' if smooth and low != high else ""
        legend.append(f'<span class="key" {style}><i></i>{esc(line.name)} <b>{now}</b> {range_text}</span>')
    return _figure(title, unit, "".join(body), "".join(legend), _hover(scale, drawn, percent, x_label))


def stacked_chart(title: str, series: Sequence[Series], *, unit: str = "", x_label: str = "step") -> str:
    """Shares (0..1 of each x) stacked into bars of the averages over buckets of steps. All series have the same x."""
    series = [line for line in series if any(y > 0 for _, y in line.points)]
    if not series:
        return ""
    count = len(series[0].points)
    size = math.ceil(count / 50)
    scale = _Scale(series[0].points[0][0] - 0.5, series[0].points[-1][0] + 0.5, 0.0, 1.0)
    body, legend, binned = [_axes(scale, x_label, True)], [], []
    floor = [0.0] * math.ceil(count / size)
    for line in series:
        bars, means = [], []
        for index, start in enumerate(range(0, count, size)):
            bucket = line.points[start : start + size]
            mean = sum(y for _, y in bucket) / len(bucket)
            x0, x1 = scale.x(bucket[0][0] - 0.5), scale.x(bucket[-1][0] + 0.5)
            top, bottom = scale.y(min(1.0, floor[index] + mean)), scale.y(min(1.0, floor[index]))
            bars.append(f"M{x0 + 0.4:.1f} {bottom:.1f}V{top:.1f}H{max(x1 - 0.4, x0 + 0.6):.1f}V{bottom:.1f}Z")
            floor[index] += mean
            means.append(((bucket[0][0] + bucket[-1][0]) / 2, mean))
        style = f'style="--c:var(--{line.colour})"'
        body.append(f'<path class="area" {style} d="{"".join(bars)}"/>')
        share = sum(y for _, y in line.points) / count
        legend.append(f'<span class="key" {style}><i></i>{esc(line.name)} <b>{share:.0%}</b></span>')
        binned.append(Series(line.name, line.colour, means))
    return _figure(title, unit, "".join(body), "".join(legend), _hover(scale, binned, True, x_label))


def slope(values: Sequence[float | None], colours: Sequence[str]) -> str:
    """The little picture beside a headline number: one dot per evaluation, 0..1 from bottom to top."""
    width, height = 116, 40
    spots = [
        (
            8 + index * (width - 16) / max(1, len(values) - 1),
            height - 6 - min(1.0, max(0.0, value)) * (height - 12),
            colour,
        )
        for index, (value, colour) in enumerate(zip(values, colours, strict=True))
        if value is not None
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in spots)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" style="fill:var(--{c})"/>' for x, y, c in spots)
    return (
        f'<svg class="slope" viewBox="0 0 {width} {height}" aria-hidden="true">'
        f'<line class="grid" x1="0" x2="{width}" y1="{height - 6}" y2="{height - 6}"/>'
        f'<line class="grid" x1="0" x2="{width}" y1="6" y2="6"/><polyline points="{line}"/>{dots}</svg>'
    )
