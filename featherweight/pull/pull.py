"""Pull the weights of a network that is being trained towards the nearest weights of a form: ADMM in two calls.

Paper: Yin, Sui, Liao, Yuan, "Towards Efficient Tensor Decomposition-Based DNN Model Compression with Optimization
Framework", 2107.12422. min L(W) with every W in a set S is split into min L(W) + g(Z) with W = Z, g being 0 in S and
infinite elsewhere. With scaled dual variables U:

    W   some epoch of training on  L(W) + sum of rho / 2 ||W - Z + U||²      `penalty`
    Z   the point of S nearest to W + U                                      `update`, at the beginning of every epoch
    U   U + step (W - Z)

The first update leaves U at 0. Differences: (1) S is what a Method can store: tensor trains as in the paper, but also
any other factors, patterns of zeros, and grids, each weight its own; (2) rho is relative: divided by the squared norm
that the weight begins with, so that moving any weight by its own size costs rho / 2; (3) `step`, 1 in the paper, is
less: an epoch is no minimisation, and what W has not had the time for is no reason to pull harder, which makes U
overshoot and Z jump (docs/decisions/0013); (4) rho may grow from epoch to epoch, U shrinking likewise, which leaves
the dual variables rho U as they are (Boyd et al., "Distributed Optimization and Statistical Learning via the
Alternating Direction Method of Multipliers", 2011, section 3.4.1).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from featherweight.data import device_of
from featherweight.errors import FeatherweightError, SolveError, UsageError
from featherweight.finetune.ranks import Ranks
from featherweight.layers import Unit, scan
from featherweight.methods import Method, Plain
from featherweight.pull.nearest import nearest, with_books
from featherweight.pull.settings import GROWTH, RHO, STEP, check_rho
from featherweight.recipe import Recipe, assign, settled
from featherweight.stats import LayerStats

TINY = 1e-30


@final
@dataclass(frozen=True, slots=True)
class Residual:
    """Of one weight after an update. primal: ||W - Z|| / ||W||, how far the weight is from its form. dual:
    ||Z - Z before|| / ||W||, how much the nearest point still moves; before the first update Z is W."""

    primal: float
    dual: float


@final
class Pull:
    """The dense copies Z and U of a network's weights, beside them on their device, in float32 (float64 for weights in
    that). Works with any training loop:

        pull = Pull(model, methods)
        for epoch in range(epochs):
            pull.update()
            for x, y in data:
                loss = task(model(x), y) + pull.penalty()
                ...

    also under autocast, with scaled losses, and in several processes that hold equal weights (DDP: give the network
    that is wrapped). There, every process must call `update`: each finds the nearest points of its share of weights.
    """

    def __init__(
        self,
        model: nn.Module,
        methods: Method | Recipe | Mapping[str, Method],
        rho: float = RHO,
        growth: float = GROWTH,
        step: float = STEP,
        relative: bool = True,
        stats: Mapping[str, LayerStats] | None = None,
    ) -> None:
        """
        Args:
            methods: the form of every weight, by its name; other weights are left alone. A recipe says it by patterns,
                a single method is for all weights that can be compressed.
            rho: how hard weights are pulled. growth: what it is multiplied by in every update but the first.
            step: share of W - Z that U takes up.
            relative: whether rho is divided by the squared norm of every weight as it is now.
            stats: moments of the weights' inputs, by name: where they are given, nearest means least change of the
                layer's outputs, in place of the weights themselves.

        Raises:
            UsageError: there is no weight of that name, or a number is out of its range.
        """
        check_rho(rho, growth, step)
        self.model, self.stats = model, stats
        self.rho, self.growth, self.step = rho, growth, step
        self.units, self.methods = _chosen(model, methods)
        self.history: list[dict[str, Residual]] = []
        self.z: dict[str, Tensor] = {}
        self.u: dict[str, Tensor] = {}
        self.scale = {u.name: _size(self._weight(u.name)) if relative else 1.0 for u in self.units}

    def penalty(self, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """The sum over all weights of rho / 2 ||W - Z + U||², rho divided by their `scale`: a scalar, whose gradient is
        rho (W - Z + U) / scale. weights: by name, those of the network where none are given.

        Raises:
            UsageError: `update` was never called.
        """
        self._check()
        with torch.autocast(device_of(self.model).type, enabled=False):
            parts = []
            for name, z in self.z.items():
                w = (self._weight(name) if weights is None else weights[name]).to(z.dtype)
                parts.append((w - z + self.u[name]).square().sum() * (self.rho / self.scale[name] / 2))
            return torch.stack(parts).sum()

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor] | None = None) -> dict[str, Residual]:
        """Once an epoch, before its first step: Z, then U. Returns the residuals.

        Raises:
            SolveError: a weight has no nearest point.
        """
        now = {u.name: self._weight(u.name) if weights is None else weights[u.name] for u in self.units}
        w = {n: t.detach().to(torch.float64 if t.dtype == torch.float64 else torch.float32) for n, t in now.items()}
        first = not self.history
        u = {n: torch.zeros_like(t) for n, t in w.items()} if first else self.u
        z = self._nearest({n: t + u[n] for n, t in w.items()})
        if not first:
            for name, change in u.items():
                change.add_(w[name] - z[name], alpha=self.step)
        old = w if first else self.z
        self.z, self.u = z, u
        self.history.append({n: _residual(t, z[n], old[n]) for n, t in w.items()})
        if not first and self.growth != 1:
            self.rho *= self.growth
            for change in u.values():
                change.div_(self.growth)
        return self.residuals()

    def residuals(self) -> dict[str, Residual]:
        """By weight, as the last update left them.

        Raises:
            UsageError: `update` was never called.
        """
        self._check()
        return self.history[-1]

    def state_dict(self) -> dict[str, Tensor]:
        """What a run that goes on needs: Z and U, rho and what it is relative to, and the residuals of all updates."""
        names = [u.name for u in self.units]
        past = [[[h[n].primal, h[n].dual] for n in names] for h in self.history]
        state = {
            "rho": torch.tensor([self.rho], dtype=torch.float64),
            "scale": torch.tensor([self.scale[n] for n in names], dtype=torch.float64),
            "history": torch.tensor(past, dtype=torch.float64).reshape(-1, len(names), 2),
        }
        return (
            state | {f"z.{n}": t.clone() for n, t in self.z.items()} | {f"u.{n}": t.clone() for n, t in self.u.items()}
        )

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there.

        Raises:
            UsageError: it is of other weights.
        """
        names = [u.name for u in self.units]
        shapes = {f"{kind}.{n}": self._weight(n).shape for n in names for kind in "zu" if len(state["history"])}
        theirs = {n: t.shape for n, t in state.items() if n.partition(".")[0] in ("z", "u")}
        if theirs != shapes or len(state["scale"]) != len(names):
            different = sorted(n for n in {*shapes, *theirs} if shapes.get(n) != theirs.get(n))
            raise UsageError(
                f"this state is of other weights: it differs in {', '.join(different[:3]) or 'their number'}"
            )
        self.rho = float(state["rho"])
        self.scale = dict(zip(names, state["scale"].tolist(), strict=True))
        past = state["history"].tolist()
        self.history = [{n: Residual(*pair) for n, pair in zip(names, line, strict=True)} for line in past]
        z, u = ({n: state[f"{kind}.{n}"].to(self._weight(n).device, copy=True) for n in names if past} for kind in "zu")
        self.z, self.u = z, u

    def _nearest(self, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of every weight the nearest point, equal in all processes: each finds those of its share."""
        ranks, found, cause = Ranks.now(), {}, None
        methods = with_books(self.model, self.units, self.methods, wanted)
        for i, unit in enumerate(self.units):
            stats = None if self.stats is None else self.stats.get(unit.name)
            found[unit.name] = torch.empty_like(wanted[unit.name])
            if i % ranks.count == ranks.own and cause is None:
                try:
                    found[unit.name] = nearest(unit, methods[unit.name], wanted[unit.name], stats)
                except Exception as error:  # whatever it is, the other processes wait for this one
                    cause = SolveError(f"{unit.name}: {error}") if isinstance(error, FeatherweightError) else error
        elsewhere = _failed(cause is not None, ranks, device_of(self.model))
        if cause is not None:
            raise cause
        if elsewhere:
            raise SolveError(f"process {elsewhere[0]} found no nearest point for a weight of its share")
        if ranks.count > 1:
            for i, unit in enumerate(self.units):
                dist.broadcast(found[unit.name], i % ranks.count)
        return found

    def _weight(self, name: str) -> Tensor:
        return self.model.get_parameter(name)

    def _check(self) -> None:
        if not self.history:
            raise UsageError("call update() before the first step of training: it finds the points to pull towards")


def _chosen(
    model: nn.Module, methods: Method | Recipe | Mapping[str, Method]
) -> tuple[tuple[Unit, ...], dict[str, Method]]:
    """The weights, in the network's order, and their methods."""
    if not isinstance(methods, Mapping):
        recipe = methods if isinstance(methods, Recipe) else Recipe(methods)
        found = scan(model, recipe.include, recipe.exclude)
        every, by_name = found.units, assign(recipe, found)
    else:
        every = scan(model).units
        for name, method in methods.items():
            if not hasattr(method, "solve"):
                raise UsageError(f"the form of '{name}' must be a method, got {type(method).__name__}")
        known = {u.name: u for u in every}
        by_name = {n: settled(m, known[n]) if n in known else m for n, m in methods.items()}
        for name, method in by_name.items():
            if isinstance(method, Plain) and method != methods[name]:
                raise UsageError(f"{name} is {method.why}; leave it out, or give it another form")
    unknown = sorted(set(by_name) - {u.name for u in every})
    units = tuple(u for u in every if not isinstance(by_name.get(u.name, Plain()), Plain))  # plain: as it is
    if unknown or not units:
        some = ", ".join(u.name for u in every[:3])
        what = f"there is no weight '{unknown[0]}' that can be compressed" if unknown else "no weight is given a form"
        raise UsageError(f"{what}; the network has {len(every)} ({some}, ...)")
    return units, {u.name: by_name[u.name] for u in units}


def _size(weight: Tensor) -> float:
    """The squared norm; 1 for zeros."""
    return float(weight.detach().double().square().sum()) or 1.0


def _residual(w: Tensor, z: Tensor, old: Tensor) -> Residual:
    size = max(float(w.double().norm()), TINY)
    return Residual(float((w - z).double().norm()) / size, float((z - old).double().norm()) / size)


def _failed(own: bool, ranks: Ranks, device: torch.device) -> list[int]:
    """The processes that did."""
    if ranks.count == 1:
        return [0] * own
    flags = torch.zeros(ranks.count, device=device)
    flags[ranks.own] = float(own)
    dist.all_reduce(flags)
    return [i for i, flag in enumerate(flags.tolist()) if flag]
