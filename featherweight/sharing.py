"""Books of words and dictionaries that weights have in common, found once for all of them before any of them is
solved."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from featherweight.database import Database, fingerprint
from featherweight.layers import Unit
from featherweight.methods import Additive, DictionaryPairs, Method, PruneQuantize
from featherweight.methods import common as dictionaries
from featherweight.methods.additive import additive_of
from featherweight.methods.books import Books, fit
from featherweight.methods.common import Member
from featherweight.methods.vectors import Layer
from featherweight.recipe import with_additive
from featherweight.solve import Progress
from featherweight.stats import LayerStats


def fitted(
    net: nn.Module,
    units: Sequence[Unit],
    stats: Mapping[str, LayerStats],
    methods: Mapping[str, Sequence[Method]],
    store: Database | None,
    progress: Progress,
) -> dict[str, list[Method]]:
    """The methods of every unit with books in place where they have none yet: one set for each equal setting; and with
    the dictionaries that `arranged` found to be common."""
    methods = _with_dictionaries(net, units, methods, progress)
    by_name = {u.name: u for u in units}
    wanted: dict[Additive, list[tuple[str, Method]]] = {}
    for name, own in methods.items():
        for method in own:
            spec = additive_of(method)
            if spec is not None and spec.books is None:
                wanted.setdefault(spec, []).append((name, method))
    if not wanted:
        return {name: list(own) for name, own in methods.items()}
    found: dict[Additive, Books] = {}
    progress("books", 0, len(wanted))
    for spec, users in wanted.items():
        layers = [_layer(net, by_name[name], stats[name], method, spec) for name, method in users]
        found[spec] = _fitted(layers, spec, store)
        progress("books", len(found), len(wanted))

    def done(method: Method) -> Method:
        spec = additive_of(method)
        return method if spec is None or spec.books else with_additive(method, replace(spec, books=found[spec]))

    return {name: [done(m) for m in own] for name, own in methods.items()}


def _layer(net: nn.Module, unit: Unit, stats: LayerStats, method: Method, spec: Additive) -> Layer:
    w = unit.view.matrix(net.get_parameter(unit.name).detach().cpu())
    if not isinstance(method, PruneQuantize):
        return spec.layer(w, w, stats)[0]
    pruned = method.prune.prune(w, stats)
    return spec.layer(w, pruned.weights, stats, pruned.keep)[0]


def _fitted(layers: Sequence[Layer], spec: Additive, store: Database | None) -> Books:
    """Found in the database, or fitted and kept there."""
    if store is None:
        return fit(layers, spec.cut(0))
    key = fingerprint("books", spec.vectors, [(x.w, x.start, x.hessian, x.place) for x in layers])
    kept = store.tensors(key)
    if kept is not None:
        return Books(tuple(kept[f"book{m}"] for m in range(len(kept))))
    books = fit(layers, spec.cut(0))
    store.keep(key, {f"book{m}": b for m, b in enumerate(books.words)}, {"books": spec.label})
    return books


def book_bytes(methods: Mapping[str, Method]) -> int:
    """Bytes of all books that weights will be made of, before any is fitted."""
    specs = {name: spec for name, m in methods.items() if (spec := additive_of(m)) is not None}
    return sum({replace(s, books=None): s.cut(0).storage for s in specs.values()}.values())


def dictionary_bytes(methods: Mapping[str, Method]) -> int:
    """Bytes of all dictionaries that weights have in common."""
    pairs = [m for m in methods.values() if isinstance(m, DictionaryPairs) and m.common is not None]
    return sum({m.common.name: m.common_bytes for m in pairs if m.common is not None}.values())


def arranged(net: nn.Module, units: Sequence[Unit], methods: Mapping[str, Method]) -> dict[str, Method]:
    """The same methods, with the ranks of dictionary pairs that are asked for by error, and which weights have a
    dictionary in common."""
    members = [_member(net, u, m) for u in units if isinstance(m := methods[u.name], DictionaryPairs)]
    return dict(methods) | dictionaries.arranged(members)


def _with_dictionaries(
    net: nn.Module, units: Sequence[Unit], methods: Mapping[str, Sequence[Method]], progress: Progress
) -> dict[str, list[Method]]:
    found = {name: list(own) for name, own in methods.items()}
    users: dict[str, list[tuple[Unit, DictionaryPairs]]] = {}
    for unit in units:
        for m in methods[unit.name]:
            if isinstance(m, DictionaryPairs) and m.common is not None and m.common.dictionary is None:
                users.setdefault(m.common.name, []).append((unit, m))
    for done, own in enumerate(users.values()):
        progress("dictionaries", done, len(users))
        common = own[0][1].common
        assert common is not None
        fitted = dictionaries.fit([_member(net, u, m) for u, m in own], common.rank)
        for unit, m in own:
            k = found[unit.name].index(m)
            found[unit.name][k] = replace(m, common=replace(common, dictionary=fitted))
    return found


def _member(net: nn.Module, unit: Unit, spec: DictionaryPairs) -> Member:
    return Member.of(unit.name, unit.view.matrix(net.get_parameter(unit.name).detach().cpu()), unit.taps, spec)
