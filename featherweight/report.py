"""What was done and what came of it: plain data, and tables for people."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, final

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from featherweight.activations import FloatInput
from featherweight.allocator import NAMES, Allocation
from featherweight.artifact import Artifact
from featherweight.chains.choose import OTHER, ChainRow
from featherweight.finetune import Trained
from featherweight.layers import LeftAlone
from featherweight.packing import FULL as FULL_DIGITS
from featherweight.pull import Pulled
from featherweight.repair import Repair
from featherweight.search import TEMPERATURE
from featherweight.stages import stored_as
from featherweight.synthesis import Assumed
from featherweight.target import Baselines
from featherweight.weights import Factors
from featherweight.weights.coded import stored_bytes

FULL = 0.98  # of a budget: below, people are told why


@final
@dataclass(frozen=True, slots=True)
class Row:
    """One weight. bytes: its exact payload. bits: per weight, everything it stores included. error: share of the
    layer's output energy that was lost on the calibration data (0 is lossless), of the weights' where there were none.
    input_bits: what its inputs are rounded to, None for float inputs."""

    name: str
    shape: tuple[int, ...]
    kind: str
    method: str
    params: int
    bytes: int
    bits: float
    error: float | None
    note: str = ""
    input_bits: int | None = None


@final
@dataclass(frozen=True, slots=True)
class Report:
    """The result of `compress`. file_bytes: the whole file. before, after: the metrics of the dense network and of
    the network read back, where one was given. rest: how the other tensors are stored. damping: what each
    layer's Hessian took, relative to its mean diagonal. seconds: by stage. reused: how many weights came solved from
    the database, None where there was none. in_order: how many were solved on the compressed network's inputs;
    order_note: why on fewer samples, or not at all. float_inputs: where inputs are rounded, the weights whose inputs
    are not, and why. allocation: how a target was met, None without one. pulled: how the dense network was trained,
    None where it was not. finetuned: how the loss fell, None without finetuning. assumed: what stood in for data, None
    where there were some or none were looked at."""

    rows: tuple[Row, ...]
    left_alone: tuple[LeftAlone, ...]
    baselines: Baselines
    file_bytes: int
    repair: Repair
    rest: dict[str, float]
    damping: dict[str, float]
    seconds: dict[str, float]
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    reused: int | None = None
    in_order: int = 0
    order_note: str = ""
    float_inputs: tuple[FloatInput, ...] = ()
    allocation: Allocation | None = None
    pulled: Pulled | None = None
    finetuned: Trained | None = None
    assumed: Assumed | None = None

    @property
    def ratio(self) -> float:
        """How many times smaller than fp32 the file is."""
        return self.baselines.fp32 / self.file_bytes

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self) | {"ratio": self.ratio, "notes": [str(line) for line in assumed_lines(self.assumed)]}


def rows_of(artifact: Artifact) -> tuple[Row, ...]:
    """The per-weight table of a file."""
    rows = []
    for unit in artifact.units:
        weight = unit.weight
        params = weight.shape[0] * weight.shape[1]
        kind = str(weight.meta().get("values", weight.kind)) if weight.kind == "sparse" else weight.kind
        stored_kind = weight.kind if kind == weight.kind else f"{weight.kind} {kind}"
        stored = stored_bytes(weight)
        rows.append(
            Row(
                " = ".join(unit.names),
                unit.view.shape,
                stored_as(weight, unit.view) if isinstance(weight, Factors) else stored_kind,
                unit.method,
                params,
                stored,
                8 * stored / params,
                unit.error,
                unit.note,
                None if unit.input is None else unit.input.bits,
            )
        )
    return tuple(rows)


def with_runs(rows: Sequence[Row], chains: Sequence[ChainRow]) -> tuple[Row, ...]:
    """The rows, those of factors that no chain of layers computes with fewer multiplications with a remark."""
    return tuple(
        replace(row, note=row.note or f"runs decoded: {chain.reason}") if chain.reason not in ("", OTHER) else row
        for row, chain in zip(rows, chains, strict=True)
    )


def weights_table(rows: tuple[Row, ...], file_bytes: int) -> Table:
    """A line a weight, the sum and the file below."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("weight", "stored as", "method"):
        table.add_column(title, overflow="fold")
    for title in ("bits", "bytes", "error"):
        table.add_column(title, justify="right", no_wrap=True)
    rounded = any(row.input_bits for row in rows)
    if rounded:
        table.add_column("inputs", justify="right", no_wrap=True)
    for row in rows:
        error = "" if row.error is None else f"{row.error:.2%}"
        inputs = [f"{row.input_bits} bit" if row.input_bits else "float"] * rounded
        sizes = f"{row.bits:.2f}", f"{row.bytes:,}", error, *inputs
        table.add_row(escape(row.name), row.kind, escape(row.method), *sizes)
        if row.note:
            table.add_row(Text(f"  {row.note}", style="yellow"))
    payload = sum(r.bytes for r in rows)
    params = sum(r.params for r in rows)
    table.add_section()
    table.add_row(f"{len(rows)} weights", "", "", f"{8 * payload / max(params, 1):.2f}", f"{payload:,}")
    table.add_row("the rest and the header", "", "", "", f"{file_bytes - payload:,}")
    table.add_row("file", "", "", "", f"{file_bytes:,}", style="bold")
    return table


def left_alone_table(left: tuple[LeftAlone, ...]) -> Table:
    """What is stored as it is, by reason."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("left alone")
    table.add_column("numbers", justify="right")
    table.add_column("why", overflow="fold")
    for reason in dict.fromkeys(x.reason for x in left):
        same = [x for x in left if x.reason == reason]
        names = same[0].name if len(same) == 1 else f"{same[0].name} and {len(same) - 1} more"
        table.add_row(escape(names), f"{sum(x.params for x in same):,}", reason)
    return table


def float_inputs_lines(left: tuple[FloatInput, ...]) -> list[Text]:
    """Which inputs are not rounded, a line a reason."""
    lines = []
    for reason in dict.fromkeys(x.reason for x in left):
        names = [x.name for x in left if x.reason == reason]
        some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        lines.append(Text(f"inputs of {some} stay float: {reason}", style="yellow"))
    return lines


def assumed_lines(assumed: Assumed | None) -> list[Text]:
    """What stood in for data."""
    return [] if assumed is None else [Text(assumed.text, style="yellow")]


def repair_line(repair: Repair) -> str:
    """One sentence."""
    what = {"batchnorm": "BatchNorm statistics", "mean": "layer means"}.get(repair.kind, "correction")
    note = f" ({repair.note})" if repair.note else ""
    if repair.kind == "none":
        return f"correction: none{note}"
    after = "NaN" if repair.after is None else f"{repair.after:.3g}"
    change = f"distance to the dense outputs on held-out data {repair.before:.3g} -> {after}"
    verdict = "applied" if repair.applied else "not applied: it did not help"
    return f"{what} of {repair.sites} layers corrected, {change}: {verdict}{note}"


def finite(value: Any) -> Any:
    """The same with None for numbers that JSON does not have."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {k: finite(v) for k, v in value.items()}
        case list() | tuple():
            return [finite(v) for v in value]
    return value


def allocation_lines(allocation: Allocation | None, file_bytes: int) -> list[Text]:
    """How a target was met, or would be."""
    if allocation is None:
        return []
    used = {"bytes": file_bytes} | {b: getattr(allocation, b) for b in NAMES if b != "bytes"}
    lines = []
    for budget, limit in allocation.limits.items():
        what = NAMES[budget]
        share, least = used[budget] / max(limit, 1), allocation.floor[budget]
        full = "" if share >= FULL else ": what would use the rest is too large, or not better by the score"
        lines.append(
            Text(f"{used[budget]:,} of {limit:,} {what} used ({share:.1%}){full}; the smallest reachable is {least:,}")
        )
    line = f"predicted distance to the dense outputs {allocation.predicted:.3g} ({allocation.score})"
    if allocation.measured is not None:
        line += f"; measured on held-out data, divergences at temperature {TEMPERATURE:g}: {allocation.first:.3g}, "
        line += f"after {allocation.policies} policies "
        line += f"{allocation.measured:.3g}"
    return [*lines, Text(line, style="dim")]


def pulled_line(pulled: Pulled) -> str:
    """One sentence."""
    first, last = (statistics.median(each[k] for each in pulled.primal.values()) for k in (0, -1))
    losses = " -> ".join(f"{x:.3g}" for x in pulled.losses)
    change = f"distance of the weights to their forms {first:.1%} -> {last:.1%} (median)"
    return f"trained by ADMM: {change}, mean loss of each epoch {losses}"


def summary(report: Report, where: str) -> Group:
    """What `compress` prints last."""
    sizes = Table(box=None, pad_edge=False, show_header=True, header_style="bold")
    sizes.add_column("")
    sizes.add_column("bytes", justify="right")
    sizes.add_column("smaller", justify="right")
    metrics = list(report.before)
    for name in metrics:
        sizes.add_column(escape(name), justify="right")
    base = report.baselines
    blank = [""] * len(metrics)
    sizes.add_row("fp32", f"{base.fp32:,}", "1.0x", *(f"{report.before[m]:.2f}" for m in metrics))
    sizes.add_row("half", f"{base.half:,}", f"{base.fp32 / base.half:.1f}x", *blank, style="dim")
    sizes.add_row("plain int8", f"{base.int8:,}", f"{base.fp32 / base.int8:.1f}x", *blank, style="dim")
    after = [f"{report.after[m]:.2f}" if m in report.after else "" for m in metrics]
    sizes.add_row(escape(where), f"{report.file_bytes:,}", f"{report.ratio:.1f}x", *after, style="bold")
    notes = assumed_lines(report.assumed)
    notes += [Text(f"{row.name}: {row.note}", style="yellow") for row in report.rows if row.note]
    if report.reused is not None:
        notes.append(Text(f"{report.reused} of {len(report.rows)} weights came solved from the database"))
    if report.in_order or report.order_note:
        what = "solved on the inputs that the compressed layers before them give"
        note = f" ({report.order_note})" if report.order_note else ""
        notes.append(Text(f"{report.in_order} of {len(report.rows)} weights {what}{note}", style="dim"))
    notes += float_inputs_lines(report.float_inputs)
    notes += allocation_lines(report.allocation, report.file_bytes)
    if report.pulled is not None:
        notes.append(Text(pulled_line(report.pulled)))
    if report.finetuned is not None:
        losses = " -> ".join(f"{x:.3g}" for x in report.finetuned.losses)
        notes.append(Text(f"finetuned: mean loss of each epoch {losses}"))
    times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report.seconds.items())
    if (digits := int(report.rest.get("digits", FULL_DIGITS))) < FULL_DIGITS:
        what = f"norms and biases are kept to {digits} binary digits: held-out data show no difference"
        notes.append(Text(what, style="dim"))
    return Group(*notes, Text(repair_line(report.repair)), Text(times, style="dim"), Text(), sizes)
