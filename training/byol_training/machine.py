"""Where to train, and in which number format."""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from byol_serving.errors import InvalidConfig
from byol_training.config import Compile, Precision


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A device, and whether matrix products run in bf16 there."""

    device: torch.device
    """As torch names it."""
    bf16: bool
    """Autocast to bf16; weights, batch norm statistics and the loss stay float32."""

    def autocast(self) -> AbstractContextManager[object]:
        """The context for a forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()


def choose_machine(device: str, precision: Precision) -> Machine:
    """The device a configuration asks for.

    Args:
        device: auto, or a torch device name.
        precision: auto takes bf16 where the hardware multiplies in it (on processors: AVX512-BF16),
            since emulation is slower than float32.

    Raises:
        InvalidConfig: no such device here.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        chosen = torch.device(name)
        torch.zeros(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidConfig(f"device {device!r} cannot be used ({reason}); try auto") from error
    return Machine(device=chosen, bf16=precision == "bf16" or _fast_bf16(chosen, precision))


def use_processors(processes: int) -> int:
    """Sets torch's threads to this process's share of the processors it may use; returns them.

    torch counts processors and knows no quota of a container; torchrun sets one thread a process.
    OMP_NUM_THREADS is kept to, unless torchrun set it.

    Args:
        processes: of this run on this machine.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        usable = min(usable or 1, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or "max": no quota
        pass
    asked = os.environ.get("OMP_NUM_THREADS", "")
    threads = max(1, (usable or 1) // processes)
    if processes == 1 and asked.isdecimal():
        threads = int(asked)
    torch.set_num_threads(threads)
    return threads


def compile_networks(model: nn.Module, wanted: Compile, machine: Machine) -> None:
    """torch.compile for `model`, in place; what cannot be compiled goes on without.

    On processors `auto` leaves it out: measured, see docs/training.md.
    """
    if wanted == "off" or (wanted == "auto" and machine.device.type != "cuda"):
        return
    torch._dynamo.config.suppress_errors = True  # falls back, with a line in the log
    model.compile()


def _fast_bf16(device: torch.device, precision: Precision) -> bool:
    if precision != "auto":
        return False
    match device.type:
        case "cuda":
            return torch.cuda.get_device_capability(device) >= (8, 0)
        case "cpu":
            # Private in torch, so absence is treated as "no".
            probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
            return bool(probe and probe())
        case _:
            return False
