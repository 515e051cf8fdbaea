"""Pages that open without a network: charts as SVG, tables, light and dark."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

WIDTH, HEIGHT = 640, 230
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 34
# Points that a line is thinned to: more are not seen at this width.
POINTS = 1000

_STYLE = """
:root{color-scheme:light dark;--back:#fff;--text:#1b1f24;--soft:#667;--grid:#e3e6ea;--box:#f6f7f9;
--c0:#2266aa;--c1:#d1495b;--c2:#2e8b57;--c3:#b8860b;--c4:#7a4fa3;--c5:#00868b;--c6:#8b5a2b;--c7:#666}
@media (prefers-color-scheme:dark){:root{--back:#14171b;--text:#e4e7eb;--soft:#9aa3ad;--grid:#2b3037;--box:#1c2026;
--c0:#6cb0ff;--c1:#ff8a99;--c2:#6fd39b;--c3:#e6c35c;--c4:#c3a0ee;--c5:#5fd3d8;--c6:#d6a77a;--c7:#aaa}}
body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;padding:1.5em;
max-width:1360px;background:var(--back);color:var(--text)}
h1{font-size:1.5em;margin:.2em 0}h2{font-size:1.1em;margin:1.6em 0 .4em}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,520px),1fr));gap:1em}
figure{margin:0;padding:.6em .8em;background:var(--box);border-radius:8px}figcaption{font-weight:600}
svg{width:100%;height:auto;display:block}svg text{font-size:11px;fill:var(--soft)}
.grid{stroke:var(--grid)}.line{fill:none;stroke-width:1.6;stroke-linejoin:round}
.keys{font-size:13px;color:var(--soft)}.keys span{display:inline-block}
.keys b{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin:0 .35em 0 1em}
pre{background:var(--box);padding:.8em;border-radius:8px;overflow:auto;white-space:pre-wrap}
table{border-collapse:collapse;font-size:14px}td,th{padding:3px 12px 3px 0;text-align:left;vertical-align:top}
tr+tr{border-top:1px solid var(--grid)}.wide{overflow-x:auto}
"""


class Series(NamedTuple):
    """One line of a chart: its name and its points (x, y)."""

    name: str
    points: Sequence[tuple[float, float]]


def page(title: str, body: str) -> str:
    """A whole page; ``title`` and ``body`` are HTML."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style></head>\n'
        f"<body>\n{body}\n</body></html>\n"
    )


def chart(title: str, series: Sequence[Series], x_label: str, *, logarithmic: bool = False) -> str:
    """Lines over a common axis as a figure; nothing where no series has a point. Names are HTML.

    Args:
        title: its caption.
        series: the lines; values that are not finite, or not positive on a logarithmic axis, are left out.
        x_label: what the horizontal axis counts.
        logarithmic: scale of the vertical axis.
    """
    lines = [Series(s.name, _thinned([p for p in s.points if _drawn(p[1], logarithmic)])) for s in series]
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    ys = [math.log10(y) if logarithmic else y for line in lines for _, y in line.points]
    x_ticks = _ticks(min(xs), max(xs))
    y_ticks = _logarithmic_ticks(min(ys), max(ys)) if logarithmic else _ticks(min(ys), max(ys))
    x_range = (min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1)
    y_range = (min([*ys, y_ticks[0]]), max([*ys, y_ticks[-1]]))

    def across(x: float) -> float:
        return LEFT + (x - x_range[0]) / (x_range[1] - x_range[0]) * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_range[0]) / (y_range[1] - y_range[0]) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in y_ticks:
        label = _number(10**tick if logarithmic else tick)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down(tick):.1f}" y2="{down(tick):.1f}"/>'
        )
        parts.append(f'<text x="{LEFT - 6}" y="{down(tick) + 4:.1f}" text-anchor="end">{label}</text>')
    for tick in x_ticks:
        if x_range[0] <= tick <= x_range[1]:
            at = f'x="{across(tick):.1f}" y="{HEIGHT - BOTTOM + 16}"'
            parts.append(f'<text {at} text-anchor="middle">{_number(tick)}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{x_label}</text>')
    for number, line in enumerate(lines):
        points = [(across(x), down(math.log10(y) if logarithmic else y)) for x, y in line.points]
        color = f"var(--c{number % 8})"
        if len(points) == 1:
            parts.append(f'<circle cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="3" fill="{color}"/>')
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(
            f'<polyline class="line" style="stroke:{color}" points="{path}"><title>{line.name}</title></polyline>'
        )
    keys = " ".join(
        f'<span><b style="background:var(--c{i % 8})"></b>{line.name}</span>' for i, line in enumerate(lines)
    )
    named = f'<div class="keys">{keys}</div>' if len(lines) > 1 else ""
    return _figure(title, f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>{named}')


def heat_map(title: str, rows: Mapping[str, Sequence[tuple[float, float]]], x_label: str) -> str:
    """Values between 0 and 1 as shades, a row each; nothing where there are none. Names are HTML."""
    columns = sorted({x for points in rows.values() for x, _ in points})
    if not columns:
        return ""
    height = max(6, min(18, 400 // len(rows)))
    cell = (WIDTH - LEFT - RIGHT) / len(columns)
    place = {x: LEFT + number * cell for number, x in enumerate(columns)}
    parts = []
    for number, (name, points) in enumerate(rows.items()):
        y = TOP + number * height
        if number % math.ceil(12 / height) == 0:
            parts.append(f'<text x="{LEFT - 6}" y="{y + height / 2 + 4:.1f}" text-anchor="end">{name}</text>')
        for x, value in points:
            shade = f'fill="var(--c0)" fill-opacity="{min(1.0, max(0.02, value)):.3f}"'
            parts.append(
                f'<rect x="{place[x]:.1f}" y="{y}" width="{cell + 0.3:.1f}" height="{height}" {shade}>'
                f"<title>{name}, {x_label} {_number(x)}: {value:.3f}</title></rect>"
            )
    bottom = TOP + len(rows) * height + 16
    for x, anchor in ((columns[0], "start"), (columns[-1], "end")):
        at = LEFT if anchor == "start" else WIDTH - RIGHT
        parts.append(f'<text x="{at}" y="{bottom}" text-anchor="{anchor}">{x_label} {_number(x)}</text>')
    return _figure(title, f'<svg viewBox="0 0 {WIDTH} {bottom + 6}" role="img">{"".join(parts)}</svg>')


def html_table(rows: Sequence[Sequence[Any]]) -> str:
    """Rows of text, the first one the head."""
    head, *body = ["".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row)
                   for tag, row in zip(["th", *["td"] * len(rows)], rows)]  # fmt: skip
    lines = "".join(f"<tr>{row}</tr>\n" for row in [head, *body])
    return f'<div class="wide"><table>\n{lines}</table></div>'


def _figure(title: str, inner: str) -> str:
    return f"<figure><figcaption>{title}</figcaption>{inner}</figure>\n"


def _drawn(value: float, logarithmic: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not logarithmic)


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    step = math.ceil(len(points) / POINTS)
    return [*points[:-1:step], *points[-1:]] if step > 1 else points


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers that enclose an interval."""
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    size = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(factor * size for factor in (1, 2, 5, 10) if (high - low) / (factor * size) <= 5)
    return [number * step for number in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _logarithmic_ticks(low: float, high: float) -> list[float]:
    """Logarithms of 1, 2 and 5 times powers of ten, or of these alone where they are many, that enclose an interval."""
    factors = (1, 2, 5) if high - low < 3 else (1,)
    powers = range(math.floor(low) - 1, math.ceil(high) + 2)
    every = sorted(math.log10(factor) + power for power in powers for factor in factors)
    first = max(number for number, tick in enumerate(every) if tick <= low)
    last = min(number for number, tick in enumerate(every) if tick >= high and number > first)
    return every[first : last + 1]


def _number(value: float) -> str:
    if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
