"""Which layers have a dictionary in common, and which one: the best for all of their rows together.

[X1, X2, ...] = D [C1, C2, ...] of layers with equal columns, as in the second paper of dictionary.py, each X divided by
its norm, so that relative errors add up. The paper has pairs of neighbours share; here a layer joins layers before it
where that pays: less error from as many bytes, or fewer bytes within the error that was asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from featherweight.methods.dictionary import Common, DictionaryPairs, in_blocks, pair, rank_within, spectrum, tails
from featherweight.weights import Factor

GAIN = 1e-6  # relative, that sharing must have


@final
@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """A layer. x: (blocks, rows, columns) float64, divided by its norm. place: only layers of the same one share."""

    name: str
    x: Tensor
    taps: int
    spec: DictionaryPairs
    place: str = ""

    @classmethod
    def of(cls, name: str, w: Tensor, taps: int, spec: DictionaryPairs) -> "Member":
        x = in_blocks(w.double(), spec.blocks((w.shape[0], w.shape[1]), taps))
        norm = float(x.norm())
        place = {"network": "", "stage": name.partition(".")[0]}.get(spec.share, name)
        return cls(name, x / norm if norm > 0 else x, taps, spec, place)

    @property
    def shape(self) -> tuple[int, int]:
        blocks, rows, cols = self.x.shape
        return rows, blocks * cols


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """Layers with one dictionary. loss: the sum of their squared relative errors."""

    members: tuple[Member, ...]
    rank: int
    bytes: int
    loss: float


def arranged(members: Sequence[Member]) -> dict[str, DictionaryPairs]:
    """The methods of all layers by name, with the ranks that errors come to, and what is in common."""
    found: dict[str, DictionaryPairs] = {}
    groups: dict[tuple[object, ...], list[_Group]] = {}
    for m in members:
        found[m.name] = m.spec
        if m.spec.rank is not None or (m.spec.error is None and m.spec.share == "layer"):
            continue
        own = _alone(m)
        found[m.name] = replace(m.spec, rank=own.rank)
        if m.spec.share == "layer" or m.spec.is_plain(m.shape, len(m.x), own.rank):
            continue
        near = groups.setdefault((m.spec, m.place, m.shape[1], len(m.x)), [])
        tried = [(gain, k, group) for k, old in enumerate(near) for gain, group in _joined(old, own)]
        if tried:
            _, k, group = max(tried, key=lambda t: (t[0], -t[1]))
            near[k] = group
        else:
            near.append(own)
    for group in (g for near in groups.values() for g in near if len(g.members) > 1):
        first = group.members[0]
        common = Common(first.name, first.shape[1], len(first.x), group.rank)
        found |= {m.name: replace(m.spec, rank=group.rank, common=common) for m in group.members}
    return found


def fit(members: Sequence[Member], rank: int) -> Factor:
    """The dictionary of layers that share one, stored as their settings say."""
    return members[0].spec.factors(*pair(_stacked(members), rank))[1]


def _stacked(members: Sequence[Member]) -> Tensor:
    return torch.cat([m.x for m in members], dim=1)


def _alone(m: Member) -> _Group:
    """With the rank that its settings give it."""
    left = tails(spectrum(m.x))
    rank = m.spec.rank_of(m.shape, m.taps) if m.spec.error is None else rank_within(left, m.spec.error)
    return _Group((m,), rank, _bytes((m,), rank), float(left[rank]))


def _bytes(members: Sequence[Member], rank: int) -> int:
    spec, blocks = members[0].spec, len(members[0].x)
    coefficients = sum(spec.coefficient_bytes(m.shape[0], blocks, rank) for m in members)
    return coefficients + spec.dictionary_bytes(members[0].shape[1], blocks, rank)


def _joined(a: _Group, b: _Group) -> list[tuple[float, _Group]]:
    """The two as one and what that gains, or nothing where it gains nothing."""
    members, total = a.members + b.members, a.bytes + b.bytes
    x, spec = _stacked(members), members[0].spec
    if spec.error is not None:
        rank, loss = _rank_within_each(members, x, spec.error)
        size = _bytes(members, rank)
        gain = 1 - size / total
        return [(gain, _Group(members, rank, size, loss))] if gain > GAIN else []
    most = min(x.shape[1:])
    rank = max((r for r in range(1, most + 1) if _bytes(members, r) <= total), default=0)
    if rank == 0:
        return []
    loss = float(tails(spectrum(x))[rank])
    gain = 1 - loss / (a.loss + b.loss) if a.loss + b.loss > 0 else 0.0
    return [(gain, _Group(members, rank, _bytes(members, rank), loss))] if gain > GAIN else []


def _rank_within_each(members: Sequence[Member], x: Tensor, error: float) -> tuple[int, float]:
    """The smallest rank of the best common dictionary with which every member keeps its error; their losses."""
    _, d = pair(x, min(x.shape[1:]))
    atoms = d / d.norm(dim=2, keepdim=True).clamp(min=torch.finfo(d.dtype).tiny)
    left = [1 - (m.x @ atoms.mT).square().sum(dim=(0, 1)).cumsum(0) for m in members]
    rank = max(int((t > error**2).sum()) + 1 for t in left)
    rank = min(rank, len(left[0]))
    return rank, sum(max(float(t[rank - 1]), 0.0) for t in left)
