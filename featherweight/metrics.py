"""Accuracy of a classifier, and metrics of the user's own."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from featherweight.data import Batch, device_of
from featherweight.errors import FeatherweightError, UsageError
from featherweight.repair.distance import outputs


@torch.no_grad()
def accuracy(model: nn.Module, data: Sequence[Batch]) -> dict[str, float]:
    """{'top1': percent} and, with more than five classes, 'top5'.

    Raises:
        UsageError: the data have no class labels, or the output is not one score a class.
    """
    device = device_of(model)
    hits, total, classes = torch.zeros(2), 0, 0
    for batch in data:
        target = batch.target
        if not isinstance(target, Tensor) or target.ndim != 1 or target.is_floating_point():
            raise UsageError("accuracy needs one whole-number label a sample; give --metric file.py:function instead")
        scores = next(outputs(batch.to(device).run(model)), None)
        if scores is None or scores.ndim != 2 or len(scores) != len(target):
            shape = None if scores is None else tuple(scores.shape)
            raise UsageError(f"accuracy needs outputs of shape (samples, classes), got {shape}; give --metric instead")
        classes = scores.shape[1]
        best = scores.topk(min(5, classes), dim=1).indices.cpu() == target.cpu()[:, None]
        hits += torch.tensor([best[:, 0].sum(), best.any(dim=1).sum()])
        total += len(target)
    top1, top5 = (100 * hits / total).tolist()
    return {"top1": top1, "top5": top5} if classes > 5 else {"top1": top1}


def measured(evaluate: Callable[[nn.Module], float | dict[str, float]] | None, model: nn.Module) -> dict[str, float]:
    """What a metric says, by name; nothing without one.

    Raises:
        UsageError: it failed, whatever it raised.
    """
    if evaluate is None:
        return {}
    try:
        with torch.no_grad():
            value = evaluate(model)
    except FeatherweightError:
        raise
    except Exception as error:  # the user's metric may raise anything
        raise UsageError(f"the metric failed: {type(error).__name__}: {error}") from error
    named = value if isinstance(value, dict) else {"metric": value}
    return {str(name): float(number) for name, number in named.items()}
