"""Several processes that train one network (torchrun): each takes its share of the samples, all take the same step."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from featherweight.data import device_of


@final
@dataclass(frozen=True, slots=True)
class Ranks:
    """own: the number of this process, among `count`."""

    own: int = 0
    count: int = 1

    @classmethod
    def now(cls) -> "Ranks":
        """As `torch.distributed` was initialised; a process alone where it was not."""
        if not dist.is_available() or not dist.is_initialized():
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files and speaks."""
        return self.own == 0

    def weighted(self, loss: Tensor, size: int, steps: Sequence[Tensor]) -> tuple[Tensor, int]:
        """The mean loss of all ranks' samples, and their number; the gradients of the steps become those of it."""
        if self.count == 1:
            return loss, size
        wanted = [torch.zeros_like(s) if s.grad is None else s.grad for s in steps]
        flat = torch.cat([*(g.reshape(-1) for g in wanted), loss.detach().reshape(1)]) * size
        flat = torch.cat([flat, flat.new_tensor([size])])
        dist.all_reduce(flat)
        *parts, mean = (flat[:-1] / flat[-1]).split([*(s.numel() for s in steps), 1])
        for step, part in zip(steps, parts, strict=True):
            step.grad = part.reshape(step.shape).to(step.dtype)
        return mean[0], round(float(flat[-1]))

    def from_first(self, data: bytes, device: torch.device) -> bytes:
        """The first rank's bytes, on all of them."""
        if self.count == 1:
            return data
        size = torch.tensor([len(data)], device=device)
        dist.broadcast(size, 0)
        content = torch.zeros(int(size), dtype=torch.uint8)
        if self.first:
            content = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else content
        content = content.to(device)
        if len(content):
            dist.broadcast(content, 0)
        return content.cpu().numpy().tobytes()


def several() -> bool:
    """Whether torchrun started more processes than this one."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def choose_device() -> None:
    """Give every process that torchrun started a CUDA device of its own, before a network is made on "cuda"."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if several() and torch.cuda.is_available() and local < torch.cuda.device_count():
        torch.cuda.set_device(local)


@contextmanager
def joined(network: nn.Module) -> Iterator[Ranks]:
    """The processes that torchrun started, joined for as long as this lasts: with NCCL where the network is on CUDA,
    else with Gloo."""
    own = several() and not dist.is_initialized()
    if own:
        dist.init_process_group("nccl" if device_of(network).type == "cuda" else "gloo")
    try:
        yield Ranks.now()
    finally:
        if own:
            dist.destroy_process_group()
