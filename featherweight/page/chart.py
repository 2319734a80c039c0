"""Where the marks of the chart of accuracy over bytes stand, in percent of its width and height."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import final

from featherweight.page.facts import Facts

ROOM = 0.08  # of the range, left free on every side
FAR = 6  # times as far from the best as the file is: what is farther is not drawn, or nothing could be told apart
LEAST = 0.01  # of the best, that the file counts as far at least
STEPS = (1, 2, 5, 10)


@final
@dataclass(frozen=True, slots=True)
class Mark:
    """x, y: percent from the left and the top. side: on which side of it its label has room: start, middle or end."""

    x: float
    y: float
    label: str
    side: str
    kind: str


@final
@dataclass(frozen=True, slots=True)
class Tick:
    at: float
    label: str


@final
@dataclass(frozen=True, slots=True)
class Chart:
    """name: of the metric that goes up. segments: of the front, x, y to x, y. dense: the height of the dense network,
    None where it is outside. outside: what is too far down or up to be drawn. text: the chart in a sentence."""

    name: str
    marks: tuple[Mark, ...]
    segments: tuple[tuple[float, float, float, float], ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    dense: float | None
    outside: tuple[str, ...]
    text: str


def chart_of(facts: Facts) -> Chart | None:
    """The first metric over the bytes of the file, in the logarithm; None where fewer than two sizes have it."""
    name = facts.metric
    if not name:
        return None
    points = () if facts.front is None else facts.front.points
    front = [(p.bytes, y) for p in points if p.bytes > 0 and (y := _finite(p.metrics, name)) is not None]
    plain = [(s.what, s.bytes, y) for s in facts.sizes if not s.ours and (y := _finite(s.metrics, name)) is not None]
    ours = facts.bytes, facts.after[name]
    if len(front) + len(plain) < 2 or not math.isfinite(ours[1]):
        return None
    low, high = _padded(*_window([y for _, y in front] + [y for *_, y in plain], ours[1]))
    smaller = [x for x, y in front if not low <= y <= high]
    outside = [f"{what} ({y:.2f})" for what, _, y in plain if not low <= y <= high]
    outside += [f"{len(smaller)} of the other sizes"] if smaller else []
    shown = [(x, y) for x, y in front if low <= y <= high]
    inside = [(what, x, y) for what, x, y in plain if low <= y <= high]
    sizes = [x for x, _ in shown] + [x for _, x, _ in inside] + [ours[0]]
    left, right = _padded(math.log(min(sizes)), math.log(max(sizes)))

    def across(size: float) -> float:
        return round(100 * (math.log(size) - left) / (right - left), 2)

    def up(value: float) -> float:
        return round(100 * (high - value) / (high - low), 2)

    marks = [Mark(across(x), up(y), "", "middle", "front") for x, y in shown]
    marks += [Mark(across(x), up(y), what, _side(across(x)), "plain") for what, x, y in inside]
    marks.append(Mark(across(ours[0]), up(ours[1]), "this file", _side(across(ours[0])), "ours"))
    line = [(across(x), up(y)) for x, y in front]
    segments = tuple((*a, *b) for a, b in pairwise(line))
    dense = _finite(facts.before, name)
    text = f"{name} over bytes: this file {ours[1]:.2f} at {ours[0]:,}" + "".join(
        f", {what} {y:.2f} at {x:,}" for what, x, y in plain
    )
    return Chart(
        name,
        tuple(marks),
        segments,
        tuple(Tick(across(x), _kilobytes(x)) for x in _log_ticks(math.exp(left), math.exp(right))),
        tuple(Tick(up(y), f"{y:g}") for y in _ticks(low, high)),
        None if dense is None or not low <= dense <= high else up(dense),
        tuple(outside),
        text,
    )


def _finite(metrics: dict[str, float] | None, name: str) -> float | None:
    value = math.nan if metrics is None else metrics.get(name, math.nan)
    return value if math.isfinite(value) else None


def _window(values: Sequence[float], ours: float) -> tuple[float, float]:
    """The lowest and the highest value to draw: ours, and all that are not much farther from the best."""
    best = max(*values, ours)
    far = FAR * max(best - ours, LEAST * abs(best))
    return min(y for y in (*values, ours) if y >= best - far), best


def _padded(low: float, high: float) -> tuple[float, float]:
    room = ROOM * (high - low) or max(abs(high), 1) * ROOM
    return low - room, high + room


def _side(x: float) -> str:
    return "start" if x < 15 else "end" if x > 85 else "middle"


def _ticks(low: float, high: float, count: int = 6) -> Sequence[float]:
    """Round numbers in a range, about so many."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(s * power for s in STEPS if s * power >= rough)
    first = math.ceil(low / step)
    return [round(k * step, 12) for k in range(first, math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> Sequence[float]:
    """1, 2 and 5 times powers of ten in a range; in a narrow one, evenly."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [s * 10.0**p for p in powers for s in STEPS[:3] if low <= s * 10.0**p <= high]
    return found if len(found) > 1 else _ticks(low, high, 3)


def _kilobytes(size: float) -> str:
    return f"{size / 1e6:g} MB" if size >= 1e6 else f"{size / 1e3:g} kB" if size >= 1e3 else f"{size:g} B"
