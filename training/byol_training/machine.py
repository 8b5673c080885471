"""Where to train, and in which number format."""

import functools
import os
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from byol_serving.errors import InvalidConfig
from byol_training.config import Compile, Precision

_WORTH_IT = 0.9  # of float32's time that bf16 may take


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
        precision: auto takes bf16 on GPUs that multiply in it, and on processors that have
            AVX512-BF16 if it is faster there, which is measured once a process.

    Raises:
        InvalidConfig: no such device here.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        chosen = torch.device(name)
        if name == "cuda":  # this process's own, of several
            chosen = torch.device("cuda", torch.cuda.current_device())
        torch.zeros(1, device=chosen)
        if chosen.type == "cuda":  # all batches have one shape: the fastest convolutions are sought
            torch.backends.cudnn.benchmark = True
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidConfig(f"device {device!r} cannot be used ({reason}); try auto") from error
    return Machine(device=chosen, bf16=precision == "bf16" or _fast_bf16(chosen, precision))


def send(values: Tensor, device: torch.device) -> Tensor:
    """`values`, of the CPU, on the device; the host goes on at once.

    From memory that is not pinned a copy may wait for all that the device was given before it.
    """
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


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

    Raises:
        InvalidConfig: graphs, on a processor.
    """
    mode = compile_mode(wanted, machine.device.type)
    if mode is None:
        return
    torch._dynamo.config.suppress_errors = True  # falls back, with a line in the log
    model.compile(mode=mode)


def compile_mode(wanted: Compile, device: str) -> str | None:
    """torch.compile's mode for a type of device; None: not to compile.

    reduce-overhead is torch's way to CUDA graphs of both passes: it copies the views into place,
    captures, replays, and leaves out what cannot be captured, with the reason in its log.
    """
    match wanted, device:
        case ("off", _):
            return None
        case ("auto", _):
            return "default" if device == "cuda" else None
        case ("on", _):
            return "default"
        case ("graphs", "cuda"):
            return "reduce-overhead"
        case _:
            raise InvalidConfig(
                f"compile graphs needs a CUDA device, and this is {device}; set it to auto"
            )


def _fast_bf16(device: torch.device, precision: Precision) -> bool:
    if precision != "auto":
        return False
    match device.type:
        case "cuda":
            return torch.cuda.get_device_capability(device) >= (8, 0)
        case "cpu":
            return bf16_in_hardware() and _bf16_is_faster()
        case _:
            return False


def bf16_in_hardware() -> bool:
    """Whether this processor has AVX512-BF16; without, bf16 is emulated, and slow."""
    # Private in torch, so absence is treated as "no".
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(probe and probe())


@functools.cache
def _bf16_is_faster() -> bool:
    """Times a layer of a ResNet both ways, forward and backward: a quarter of a second.

    Having the instructions does not tell: on some processors training in bf16 takes 1.4 times as
    long as in float32, on others half as long. Nor does one convolution of a millisecond or two:
    where a whole step takes 1.35 times as long, its time was seen on either side of float32's.
    """
    layer = nn.Sequential(
        nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)
    ).to(memory_format=torch.channels_last)
    images = torch.zeros(16, 64, 32, 32).contiguous(memory_format=torch.channels_last)
    images.requires_grad_()  # as within a network
    best = {True: float("inf"), False: float("inf")}
    for _ in range(3):
        for bf16 in best:
            started = time.process_time()  # not the clock: others may be using the processor
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                found = layer(images)
            found.float().sum().backward()
            best[bf16] = min(best[bf16], time.process_time() - started)
    return best[True] < _WORTH_IT * best[False]
