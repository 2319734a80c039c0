"""Layers that read one tensor, as one choice: they remove the same channels, so that these need not be made."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import nn

from featherweight.layers import Unit
from featherweight.methods import Channels, Method, Obs, PruneQuantize
from featherweight.methods.channels import Given, kept_in_common
from featherweight.stats import LayerStats

Groups = tuple[tuple[int, ...], ...]


def joined(
    net: nn.Module,
    units: Sequence[Unit],
    stats: Mapping[str, LayerStats],
    tries: Mapping[str, list[Method]],
    groups: Groups,
    fixed: Collection[str],
    coupled: Mapping[str, tuple[str, ...]],
) -> tuple[dict[str, list[Method]], Groups]:
    """Candidates' methods and groups (see `candidates.tried`, `candidates.ties`), where the readers of a coupled tensor
    are a group whose channels are chosen for all of them. Readers of which one is `fixed` or tied already stay apart.

    Args:
        coupled: see `coupling.couplings`.
    """
    number = {u.name: i for i, u in enumerate(units)}
    found, left = dict(tries), list(groups)
    for readers in dict.fromkeys(r for r in coupled.values() if len(r) > 1):
        alone = [(number[n],) for n in readers]
        levels = list(dict.fromkeys(s for m in tries[readers[0]] if (s := _removed(m)) > 0))
        alike = all(tries[n] == tries[readers[0]] for n in readers)
        if not levels or not alike or any(n in fixed for n in readers) or any(g not in left for g in alone):
            continue
        matrices = [units[number[n]].view.matrix(net.get_parameter(n).detach().cpu()) for n in readers]
        given = kept_in_common(matrices, [stats[n] for n in readers], levels)
        by_level = dict(zip(levels, given, strict=True))
        methods = [_with(m, by_level) for m in tries[readers[0]]]
        found |= {name: list(methods) for name in readers}
        left = [g for g in left if g not in alone] + [tuple(sorted(number[n] for n in readers))]
    return found, tuple(sorted(left))


def _removed(method: Method) -> float:
    """The share of its channels that a method removes, 0 for any other."""
    pruner = method.prune if isinstance(method, PruneQuantize) else method
    return pruner.pattern.sparsity if isinstance(pruner, Obs) and isinstance(pruner.pattern, Channels) else 0.0


def _with(method: Method, given: Mapping[float, Given]) -> Method:
    """A method that removes channels, with those that are given for its sparsity."""
    own = given.get(_removed(method))
    return method if own is None else replace(method, prune=own) if isinstance(method, PruneQuantize) else own
