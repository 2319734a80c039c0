"""What is told of an exported network."""

from typing import Any

from rich.table import Table
from rich.text import Text

from featherweight.export.onnx import OnnxExport

_SAME = {"4 bit": ("int4", "uint4"), "8 bit": ("int8", "uint8"), "2 bit": ("int2", "uint2"), "fp32": ("fp32",)}
_SAME |= {"fp16": ("fp16",)}


def lines_of(found: OnnxExport) -> list[Any]:
    """Sizes, what is stored otherwise than in the .fw file, how near the outputs are, and what to know."""
    plain = f"{found.bytes / found.file_bytes:.2f} times the .fw file without entropy coding ({found.file_bytes:,})"
    said: list[Any] = [Text(f"{plain}, which ONNX has not; operator set {found.opset}", style="dim")]
    other = [r for r in found.rows if r.exported not in _SAME.get(r.stored, ())]
    if other:
        table = Table(box=None, pad_edge=False, title="in another form than in the .fw file", title_justify="left")
        for heading in ("weight", "in the .fw file", "in ONNX"):
            table.add_column(heading)
        table.add_column("bytes", justify="right")
        for row in other:
            table.add_row(row.name, row.stored, row.exported, f"{row.bytes:,}")
        said.append(table)
    said += [Text(f"{name}: {reason}", style="yellow") for name, reason in found.left.items()]
    said += [Text(note, style="yellow") for note in found.notes]
    for p in found.parity:
        line = f"{p.runtime}, batch of {p.samples}: the same outputs as torch, largest difference {p.difference:.1g}"
        said.append(Text(f"{line} of the largest output", style="green"))
    return said
