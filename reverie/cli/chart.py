"""A line through some points as an SVG file, written as text: nothing needs to be installed for it."""

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 560, 340
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 20, 50
STYLE = "font-family:sans-serif;font-size:12px"


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round numbers from low to high, about so many.

    Example:
        >>> ticks(0.03, 0.25)
        [0.05, 0.1, 0.15, 0.2, 0.25]
    """
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(points: Sequence[tuple[float, float]], x_label: str, y_label: str) -> str:
    """Return the text of an SVG: points joined by a line, the lowest of them marked.

    Arguments:
        points: (x, y), finite, at least one.
        x_label: Under the axis.
        y_label: Beside the axis.

    Example:
        >>> line_chart([(0.1, 2.0), (0.2, 1.0)], "length", "distance").count("<circle")
        2
    """
    points = sorted(points)
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low_x, high_x = bounds(xs)
    low_y, high_y = bounds(ys)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)
        up = (y - low_y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM)
        return round(LEFT + across, 2), round(HEIGHT - BOTTOM - up, 2)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" style="{STYLE}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for value in ticks(low_x, high_x):
        x, y = place(value, low_y)
        parts.append(f'<path d="M{x} {y}v4" stroke="#555"/>')
        parts.append(f'<text x="{x}" y="{y + 18}" text-anchor="middle">{value:g}</text>')
    for value in ticks(low_y, high_y):
        x, y = place(low_x, value)
        parts.append(f'<path d="M{x} {y}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 6}" y="{y + 4}" text-anchor="end">{value:g}</text>')
    parts.append(f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" fill="none" stroke="#555"/>')
    path = " L".join("{} {}".format(*place(x, y)) for x, y in points)
    parts.append(f'<path d="M{path}" fill="none" stroke="#00798c" stroke-width="1.5"/>')
    for x, y in points:
        across, up = place(x, y)
        radius, colour = (5, "#d1495b") if y == min(ys) else (3, "#00798c")
        parts.append(f'<circle cx="{across}" cy="{up}" r="{radius}" fill="{colour}"/>')
    middle = (HEIGHT - BOTTOM + TOP) / 2
    parts.append(f'<text x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(
        f'<text x="16" y="{middle}" text-anchor="middle" transform="rotate(-90 16 {middle})">{escape(y_label)}</text>'
    )
    return "\n".join([*parts, "</svg>", ""])


def bounds(values: Sequence[float]) -> tuple[float, float]:
    """Return the range of some values with a little room, never empty."""
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or abs(low) * 0.1 or 1.0
    return low - room, high + room
