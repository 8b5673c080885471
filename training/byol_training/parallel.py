"""Several processes, one run: `torchrun --nproc-per-node N -m byol_cli.main train ...`.

Every process holds the whole model and works on its part of each batch. Gradients are averaged and
batch norm takes its statistics over all parts, so that N processes take the very steps that one
takes with the same batch (up to the rounding of sums in another order).
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from byol_serving.errors import InvalidConfig


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes of a run."""

    rank: int = 0
    """Which of them this is."""
    size: int = 1
    """How many there are."""

    @property
    def leads(self) -> bool:
        """Whether this process writes, logs and decides."""
        return self.rank == 0

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model whose backward pass leaves averaged gradients in `model`'s parameters."""
        if self.size == 1:
            return model
        ids = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids)

    def part(self, batch_size: int, accumulate: int, micro: int) -> slice:
        """The rows of a batch that this process works on in micro-batch `micro`."""
        of_all = batch_size // accumulate
        own = of_all // self.size
        start = micro * of_all + self.rank * own
        return slice(start, start + own)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all processes, in each of them."""
        if self.size > 1:
            dist.all_reduce(value)
            value = value / self.size
        return value

    def decide(self, decision: Any) -> Any:
        """What the leading process decided, in each of them."""
        if self.size == 1:
            return decision
        box = [decision]
        dist.broadcast_object_list(box, src=0)
        return box[0]


def without_sync(model: nn.Module, *, last: bool) -> AbstractContextManager[object]:
    """For the micro-batches before the last: gradients are averaged once a step."""
    if last or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    return model.no_sync()


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Joins the processes that torchrun started, if it did, and leaves them at the end.

    Args:
        device: as in the configuration; gloo serves processors, nccl CUDA devices.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or dist.is_initialized():
        yield current()
        return
    on_cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_cuda:  # each its own, before anything touches the first
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if on_cuda else "gloo")
    try:
        yield current()
    finally:
        dist.destroy_process_group()


def current() -> World:
    """The world that this process has joined; one of its own if none."""
    if not dist.is_initialized():
        return World()
    return World(rank=dist.get_rank(), size=dist.get_world_size())


def check_parts(world: World, batch_size: int, accumulate: int) -> None:
    """Refuses a batch that cannot be shared evenly.

    Raises:
        InvalidConfig: parts of unequal size, or of a single image.
    """
    parts = world.size * accumulate
    if batch_size % parts or batch_size // parts < 2:
        raise InvalidConfig(
            f"a batch of {batch_size} images cannot be shared by {world.size} processes in"
            f" {accumulate} micro-batches; make batch_size a multiple of {parts},"
            f" at least {2 * parts}"
        )


def synchronise_batch_norm(model: nn.Module, world: World, device: torch.device) -> nn.Module:
    """Batch norms take their statistics over all processes: torch's own on CUDA, else ours."""
    if world.size == 1:
        return model
    if device.type == "cuda":
        # torch leaves it untyped.
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(  # type: ignore[no-untyped-call]
            model
        )
        return converted
    for module in model.modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d):
            module.__class__ = _SyncBatchNorm
    return model


class _SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over all processes, where torch has none (its SyncBatchNorm needs a GPU).

    Gradients flow through the sums over processes, as they do within one.
    """

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 - torch's name for it
        """Any of [N, C, ...]."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - likewise
        """Float [N, C, ...] → the same, normalised per channel over N of all processes."""
        if not self.training:
            normalised: Tensor = super().forward(input)
            return normalised
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        world, values = dist.get_world_size(), input.float()
        dims = [0, *range(2, input.ndim)]
        shape = [1, -1, *[1] * (input.ndim - 2)]
        mean = _summed(values.mean(dims)) / world
        centred = values - mean.view(shape)
        variance = _summed(centred.square().mean(dims)) / world
        with torch.no_grad():
            count = world * input.numel() / input.shape[1]
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scaled = centred * torch.rsqrt(variance + self.eps).view(shape)
        moved: Tensor = scaled * self.weight.view(shape) + self.bias.view(shape)
        return moved.to(input.dtype)


class _Summed(torch.autograd.Function):
    """The sum over all processes, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def _summed(value: Tensor) -> Tensor:
    total: Tensor = _Summed.apply(value)
    return total
