"""Settings in words -> methods. Besides reading a file, this is the only place where a name becomes a class."""

import math
import re
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from featherweight.errors import UsageError, require
from featherweight.layers import Scan, Unit, matching
from featherweight.methods import (
    NM,
    Additive,
    Admm,
    Blocks,
    Channels,
    DictionaryPairs,
    Ecq,
    Factorize,
    Gptq,
    GridSpec,
    Magnitude,
    Method,
    Obq,
    Obs,
    Pattern,
    Plain,
    Prune,
    PruneQuantize,
    Rows,
    Rtn,
    Unstructured,
    Vectors,
)
from featherweight.methods.additive import NARROW, additive_of

QUANTIZERS: dict[str, type[Rtn] | type[Gptq] | type[Obq]] = {"rtn": Rtn, "gptq": Gptq, "obq": Obq}
PRUNERS: dict[str, type[Magnitude] | type[Obs] | type[Admm]] = {"magnitude": Magnitude, "obs": Obs, "admm": Admm}
FACTORS = {"lowrank": "lowrank", "factors": "best"} | {x: x for x in ("spatial", "tucker", "tt", "tr", "cp")}
_ADDITIVE = ("share", "vector", "books")
_FACTORS = ("keep", "ranks")
_PAIRS = ("error", "block")
_APART = (*_ADDITIVE, *_FACTORS, *_PAIRS)
SETTINGS = ("method", "bits", "sparsity", "pattern", "group", "symmetric", "damp", "quantizer", *_APART)
FINE = GridSpec(8, symmetric=True)
SHARE = 0.01  # of the bytes of all weights with books, for grids of 8 bits in place of vectors
SHARES = ("network", "stage", "layer")
_NM = re.compile(r"(\d+):(\d+)")
_BLOCKS = re.compile(r"blocks(?::(\d+))?")


@final
@dataclass(frozen=True, slots=True)
class Override:
    """Another method for the units whose name matches a shell pattern. activations: bits of their inputs, 0 for float
    inputs; None leaves it to the recipe."""

    pattern: str
    method: Method
    activations: int | None = None

    def __post_init__(self) -> None:
        _check_activations(self.activations)


@final
@dataclass(frozen=True, slots=True)
class Recipe:
    """Which weights are compressed, and how: `method`, unless an override matches (the last one that does wins).
    activations: bits of the compressed weights' inputs, 2 to 8; None or 0 keeps all inputs in float. sequential: solve
    each layer on the inputs that the compressed layers before it give, not on those of the dense network; None means
    yes under a target, no elsewhere."""

    method: Method
    overrides: tuple[Override, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    repair: bool = True
    activations: int | None = None
    sequential: bool | None = None

    def __post_init__(self) -> None:
        _check_activations(self.activations)


def _check_activations(bits: Any) -> None:
    allowed = bits is None or (type(bits) is int and (bits == 0 or 2 <= bits <= 8))
    require(allowed, "activations must be 2 to 8 bits, or 0 for float", bits)


def method_of(settings: Mapping[str, Any]) -> Method:
    """The method that settings name: `method` (rtn, gptq, obq, ecq, additive, magnitude, obs, admm, dictionary, or a
    form of factors), `bits`, `sparsity`, `pattern` (`2:4` or any other N:M, `blocks:4`, `rows`, `channels`; without
    it any weights), `group`, `symmetric`, `damp`, `quantizer` (gptq, obq or additive) for what a pruner with `bits`
    quantizes with; of additive quantization `share` (the books: network, stage or layer), `vector` (weights in one)
    and `books` (words that are added up); of factors (lowrank, spatial, tucker, tt, tr, cp, or factors for the best
    of several) `keep`, the share of the numbers that is left, or `ranks`, vbmf, and with `bits` they are on grids;
    of dictionary pairs `keep` or `error`, `block` (input channels), `bits`, and `share` (the dictionaries). A
    sparsity or pattern without a method means the better of ExactOBS and ADMM, or ADMM alone for layers where the
    first would take long. No setting at all means OBQ at 4 bits; grids of 8 bits are symmetric unless `symmetric`
    says otherwise.

    >>> method_of({"method": "gptq", "bits": 3}).label
    'gptq 3 bit'
    >>> method_of({"method": "obs", "sparsity": 0.5, "bits": 4}).label
    'obs 50% + obq 4 bit'
    >>> method_of({"method": "obs", "pattern": "2:4"}).label
    'obs 2:4'

    Raises:
        UsageError: an unknown name, a setting that the method does not have, or one that it lacks.
    """
    given = {k: v for k, v in settings.items() if v is not None} or {"method": "obq", "bits": 4}
    unknown = sorted(set(given) - set(SETTINGS))
    if unknown:
        raise UsageError(f"unknown setting {unknown[0]!r}; expected one of {', '.join(SETTINGS)}")
    by_cost = "method" not in given and ("sparsity" in given or "pattern" in given)
    name = given.pop("method", "obs" if "sparsity" in given or "pattern" in given else "obq")
    if name not in (*QUANTIZERS, *PRUNERS, *FACTORS, "additive", "ecq", "dictionary"):
        known = ", ".join((*QUANTIZERS, "ecq", "additive", *PRUNERS, "dictionary", *FACTORS))
        raise UsageError(f"unknown method {name!r}; expected one of {known}")
    if name == "dictionary":
        pairs = _pairs(given)
        _nothing_left(given, name)
        return pairs
    damp: dict[str, Any] = {"damp": _number(given.pop("damp"), "damp")} if "damp" in given else {}
    if name in ("rtn", "magnitude") and damp:
        raise UsageError(f"method '{name}' has no setting 'damp'")
    if name in FACTORS:
        return _factors(given, name, damp)
    if name == "ecq":
        if "bits" not in given:
            raise UsageError("method 'ecq' needs a number of bits a weight, for example --bits 1.8")
        coded = Ecq(_number(given.pop("bits"), "bits"), **damp)
        _nothing_left(given, name)
        return coded
    if name == "additive":
        vectors = _additive(given, damp)
        _nothing_left(given, name)
        return vectors
    grid = None if given.get("quantizer") == "additive" else _grid(given, needed=name in QUANTIZERS, method=name)
    if name in QUANTIZERS:
        _nothing_left(given, name)
        assert grid is not None
        return QUANTIZERS[name](grid, **damp)
    pattern = _pattern(given.pop("pattern", None), given.pop("sparsity", None), name)
    if given.get("quantizer") == "additive":
        pruner = (Prune if by_cost else PRUNERS[name])(pattern, **damp)
        method = PruneQuantize(pruner, _additive(given, damp))
        del given["quantizer"]
        _nothing_left(given, name)
        return method
    chosen = given.pop("quantizer", "obq") if grid is not None else None
    _nothing_left(given, name)
    if chosen not in ("gptq", "obq", None):
        raise UsageError(f"the quantizer of a pruned layer must be gptq, obq or additive, got {chosen!r}")
    quantize = None if grid is None else Gptq(grid) if chosen == "gptq" else Obq(grid)
    pruner = (Prune if by_cost else PRUNERS[name])(pattern, **damp)
    return pruner if quantize is None else PruneQuantize(pruner, quantize)


def _additive(given: dict[str, Any], damp: dict[str, Any]) -> Additive:
    """From `bits` a weight and, where given, `share`, `vector` and `books`."""
    if "bits" not in given:
        raise UsageError("method 'additive' needs a number of bits a weight, for example --bits 2")
    rate, share = _number(given.pop("bits"), "bits"), given.pop("share", "network")
    if share not in SHARES:
        raise UsageError(f"share must be one of {', '.join(SHARES)}, got {share!r}")
    length, count = given.pop("vector", None), given.pop("books", 1)
    if length is None and count == 1:
        return Additive(rate, share, **damp)
    if type(length) is not int or type(count) is not int or length < 1 or count < 1:
        raise UsageError(f"vector and books must be whole numbers above 0, together; got {length!r} and {count!r}")
    total = round(rate * length)
    if abs(total - rate * length) > 0.05 or total < count:
        raise UsageError(f"{count} books for vectors of {length} weights cannot have {rate:g} bits a weight")
    return Additive(Vectors(length, tuple((total + m) // count for m in range(count))), share, **damp)


def _pairs(given: dict[str, Any]) -> DictionaryPairs:
    """From `keep` or `error` and, where given, `bits` of the factors, `block` and `share`."""
    if len({"keep", "error"} & set(given)) != 1:
        raise UsageError("method 'dictionary' needs a share of the numbers or an error: --keep 0.5, or --error 0.1")
    keep, error = (_number(given.pop(k), k) if k in given else None for k in ("keep", "error"))
    grid = _grid(given, needed=False, method="dictionary")
    if (share := given.pop("share", "network")) not in SHARES:
        raise UsageError(f"share must be one of {', '.join(SHARES)}, got {share!r}")
    return DictionaryPairs(keep, error, grid=grid, block=given.pop("block", 0), share=share)


def _factors(given: dict[str, Any], name: str, damp: dict[str, Any]) -> Factorize:
    keep, ranks = given.pop("keep", None), given.pop("ranks", None)
    if (keep is None) == (ranks is None):
        raise UsageError(f"method '{name}' needs the share of numbers to keep, for example --keep 0.5, or --ranks vbmf")
    if ranks not in (None, "vbmf"):
        raise UsageError(f"ranks must be vbmf, got {ranks!r}; --keep 0.5 gives every layer ranks for its size")
    grid = _grid(given, needed=False, method=name)
    _nothing_left(given, name)
    share = None if keep is None else _number(keep, "keep")
    return Factorize(FACTORS[name], share, grid=grid, ranks=ranks, **damp)


def _pattern(pattern: Any, sparsity: Any, method: str) -> Pattern:
    """What to remove, from the settings `pattern` and `sparsity`."""
    if isinstance(pattern, str) and (found := _NM.fullmatch(pattern)):
        if sparsity is not None:
            raise UsageError(f"the pattern {pattern} is a sparsity; leave out the setting 'sparsity'")
        return NM(int(found[1]), int(found[2]))
    if sparsity is None:
        raise UsageError(f"method '{method}' needs a sparsity, for example --sparsity 0.5, or --pattern 2:4")
    share = _number(sparsity, "sparsity")
    match pattern:
        case None | "unstructured":
            return Unstructured(share)
        case "rows":
            return Rows(share)
        case "channels":
            return Channels(share)
        case str() if found := _BLOCKS.fullmatch(pattern):
            return Blocks(share, int(found[1] or 4))
    raise UsageError(f"pattern must be N:M (such as 2:4), blocks:4, rows, channels or unstructured, got {pattern!r}")


def _grid(given: dict[str, Any], needed: bool, method: str) -> GridSpec | None:
    if "bits" not in given:
        if needed:
            raise UsageError(f"method '{method}' needs a number of bits, for example --bits 4")
        return None
    symmetric = given.pop("symmetric", given["bits"] == 8)  # at 8 bits a zero point costs more than it gains
    if not isinstance(symmetric, bool):
        raise UsageError(f"symmetric must be true or false, got {symmetric!r}")
    return GridSpec(given.pop("bits"), symmetric, given.pop("group", None))


def _nothing_left(given: dict[str, Any], method: str) -> None:
    if given:
        raise UsageError(f"method '{method}' has no setting '{min(given)}'")


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise UsageError(f"{name} must be a number of at least 0, got {value!r}")
    return float(value)


def read_recipe(path: Path) -> Recipe:
    """A recipe from a TOML file: the settings of `method_of` at the top, `include` and `exclude` lists of patterns,
    `repair` and `sequential`, true or false, `activations = 8` to round inputs, and any number of `[[override]]` tables
    with `match` and settings, `activations` among them.

    Raises:
        UsageError: the file is missing, no TOML, or has a wrong entry; the message names it.
    """
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"cannot read the recipe {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from error
    try:
        return recipe_of(content)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def recipe_of(content: Mapping[str, Any]) -> Recipe:
    """Like `read_recipe`, of the parsed content. Overrides inherit every setting they do not give, unless they name
    another method."""
    apart = ("override", "include", "exclude", "repair", "activations", "sequential")
    top = {k: v for k, v in content.items() if k not in apart}
    overrides = []
    tables = content.get("override", [])
    if not isinstance(tables, list) or not all(isinstance(t, dict) and isinstance(t.get("match"), str) for t in tables):
        raise UsageError("each [[override]] needs a pattern: match = 'layer3.*'")
    for table in tables:
        own = {k: v for k, v in table.items() if k not in ("match", "activations")}
        method = method_of(own if "method" in own else _inherited(top, own) | own)
        overrides.append(Override(table["match"], method, table.get("activations")))
    for key in ("repair", "sequential"):
        if not isinstance(content.get(key, True), bool):
            raise UsageError(f"{key} must be true or false, got {content[key]!r}")
    return Recipe(
        method_of(top),
        tuple(overrides),
        _patterns(content, "include"),
        _patterns(content, "exclude"),
        content.get("repair", True),
        content.get("activations"),
        content.get("sequential"),
    )


def _inherited(top: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """What an override takes from the top: N:M patterns and sparsities replace each other."""
    is_nm = [_NM.fullmatch(str(x.get("pattern"))) is not None for x in (top, own)]
    dropped = {"sparsity"} if is_nm[1] else {"pattern"} if is_nm[0] and "sparsity" in own else set()
    return {k: v for k, v in top.items() if k not in dropped}


def _patterns(content: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = content.get(key, [])
    if not isinstance(value, list | tuple) or not all(isinstance(p, str) for p in value):
        raise UsageError(f"{key} must be a list of patterns, got {value!r}")
    return tuple(value)


def assign(recipe: Recipe, found: Scan) -> dict[str, Method]:
    """The method of every unit, by unit name.

    Raises:
        UsageError: an override matches no unit, or names one that it cannot be done to.
    """
    chosen = {u.name: recipe.method for u in found.units} | _overrides(recipe, found)
    return in_common({u.name: settled(chosen[u.name], u) for u in found.units}, found.units)


def overridden(recipe: Recipe, found: Scan) -> dict[str, Method]:
    """The methods of the units that an override matches, by unit name, as they are solved beside a target.

    Raises:
        UsageError: an override matches no unit.
    """
    chosen = _overrides(recipe, found)
    units = [u for u in found.units if u.name in chosen]
    return chosen | {u.name: with_additive(chosen[u.name], spec) for u, spec in _cut(chosen, units).items()}


def _overrides(recipe: Recipe, found: Scan) -> dict[str, Method]:
    chosen: dict[str, Method] = {}
    for override in recipe.overrides:
        for unit in matching(override.pattern, found.units):
            chosen[unit.name] = override.method
            if isinstance(override.method, Factorize):
                own = settled(override.method, unit)
                if isinstance(own, Plain) and override.pattern in unit.names:
                    raise UsageError(f"{unit.name} cannot be factored: {own.why}; leave out its override")
                chosen[unit.name] = own
    return chosen


def without_data(method: Method) -> Method:
    """The same where a network has no data to look at."""
    return replace(method, whiten=False) if isinstance(method, Factorize) else method


def settled(method: Method, unit: Unit) -> Method:
    """Where a method leaves open how a layer is pruned, what its size decides."""
    match method:
        case Prune() | Admm():
            return method.for_layer(unit.view.matrix_shape, unit.groups)
        case PruneQuantize(prune=Prune() | Admm() as prune):
            return replace(method, prune=prune.for_layer(unit.view.matrix_shape, unit.groups))
        case Factorize():
            kernel = tuple(unit.view.shape[2:]) if unit.taps > 1 else ()
            return method.for_layer(unit.view.matrix_shape, kernel, unit.groups)
    return method


def in_common(methods: Mapping[str, Method], units: Sequence[Unit]) -> dict[str, Method]:
    """Where weights share books: which ones, and how long vectors are, which all of these weights together decide. The
    smallest weights get grids of 8 bits, as long as that costs a small SHARE; rows too short for vectors other
    grids."""
    found, costs = dict(methods), {}
    own = _cut(methods, units)
    payload = sum(spec.rate * u.params / 8 for u, spec in own.items())
    for u, spec in own.items():
        found[u.name] = with_additive(methods[u.name], spec)
        if not isinstance(methods[u.name], PruneQuantize):
            rows, cols = u.view.matrix_shape
            costs[u] = Obq(FINE).storage((rows, cols)) - spec.storage((rows, cols))
            if cols < NARROW * spec.cut(0).d:
                found[u.name] = Obq(GridSpec(min(math.ceil(spec.rate) + 1, 8)))
    spent = 0
    for u in sorted(costs, key=costs.__getitem__):
        spent += costs[u]
        if spent > SHARE * payload:
            break
        found[u.name] = Obq(FINE)
    return found


def _cut(methods: Mapping[str, Method], units: Sequence[Unit]) -> dict[Unit, Additive]:
    """What is additive, with the name of those who share books, and vectors that suit all of their weights."""
    own = {u: spec for u in units if (spec := additive_of(methods[u.name])) is not None}
    for u, spec in own.items():
        groups = {"stage": f"stage {u.name.partition('.')[0]}", "layer": f"layer {u.name}"}
        own[u] = replace(spec, share=groups.get(spec.share, spec.share))
    weights: Counter[Additive] = Counter()
    for u, spec in own.items():
        weights[spec] += u.params
    return {u: spec.for_weights(weights[spec]) for u, spec in own.items()}


def with_additive(method: Method, own: Additive) -> Method:
    """The same method, storing vectors like that."""
    return replace(method, quantize=own) if isinstance(method, PruneQuantize) else own


def input_bits(recipe: Recipe, found: Scan) -> dict[str, int]:
    """The bits that the inputs of every unit are to be rounded to, by unit name; 0 for float. Empty where all are."""
    chosen = dict.fromkeys((u.name for u in found.units), recipe.activations or 0)
    for override in recipe.overrides:
        if override.activations is not None:
            chosen |= {u.name: override.activations for u in matching(override.pattern, found.units)}
    return chosen if any(chosen.values()) else {}
