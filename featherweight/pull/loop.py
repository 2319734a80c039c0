"""Train a dense network by ADMM: the loop of finetuning, the penalty of `Pull`, and its update before every epoch."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from featherweight.activations import plain_copy
from featherweight.data import device_of
from featherweight.finetune import rehearse
from featherweight.finetune.loop import Progress, Task, descend, quiet, started
from featherweight.finetune.statistics import statistics
from featherweight.finetune.variables import MANY, Variable
from featherweight.methods import Method
from featherweight.pull.pull import Pull
from featherweight.pull.settings import AdmmTraining, Pulled
from featherweight.recipe import Recipe
from featherweight.stats import LayerStats


def admm(
    model: nn.Module,
    methods: Method | Recipe | Mapping[str, Method],
    how: AdmmTraining,
    progress: Progress = quiet,
    stats: Mapping[str, LayerStats] | None = None,
) -> tuple[nn.Module, Pulled]:
    """Train all parameters of a network, in its dense structure, towards its own outputs (or labels, or a loss of your
    own) while every weight is pulled to the nearest one of its form. Returns the trained network, in eval mode, and
    how it went. The network given is not changed: it is the teacher. Where `torch.distributed` is initialised, every
    process must call this.

    Norms stay in eval mode, as in finetuning, unless `how.norms` is "batch": running statistics are what they were,
    scales and shifts are trained.

    Args:
        model: on the device to train on. methods, stats: see `Pull`.

    Raises:
        UsageError: the data do not fit or hold no labels that are asked for, a name is no weight's, the loss is no
            number, or the checkpoint is of something else.
        SolveError: a weight has no nearest point.
    """
    dense = plain_copy(model)
    how = rehearse(dense, how)
    small = copy.deepcopy(dense)
    buffers = {n: b.clone() for n, b in small.named_buffers()}  # a network may count its calls in one
    pull = Pull(small, methods, how.rho, how.growth, how.step, stats=stats)
    with statistics(small, how):
        trained = {n: p for n, p in small.named_parameters() if p.is_floating_point() and bool(torch.isfinite(p).all())}
        device = device_of(small)
        variables = {n: Variable.of(n, p, MANY if p.ndim > 1 else 1.0, device) for n, p in trained.items()}

        def state() -> dict[str, Tensor]:
            return {n: v.now().to(v.dtype) for n, v in variables.items()}

        def begin() -> None:
            pull.update(state())

        every = list(variables.values())
        task = Task(
            dense,
            small,
            every,
            state,
            lambda: started(dense, every),
            {"methods": {n: m.label for n, m in pull.methods.items()}},
            how.loss,
            pull.penalty,
            begin,
            pull.state_dict,
            pull.load_state_dict,
        )
        losses = descend(task, how, progress)
        begin()
        with torch.no_grad():
            for name, variable in variables.items():
                small.get_parameter(name).copy_(variable.result())
            for name, buffer in buffers.items():  # statistics of norms are found again, where they are of batches
                small.get_buffer(name).copy_(buffer)
    primal = {u.name: tuple(h[u.name].primal for h in pull.history) for u in pull.units}
    dual = {u.name: tuple(h[u.name].dual for h in pull.history) for u in pull.units}
    return small, Pulled(losses, primal, dual)
