"""What the parts of benchmarks/gpu.py are asked, and what they answer."""

from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line said."""

    device: str
    """cuda or cpu."""
    quick: bool
    """Tiny sizes: only that everything works."""
    record_seconds: float
    """Of the long run of item 3; 0 for none."""
    scratch: Path
    """A folder that is removed at the end."""

    @property
    def on_gpu(self) -> bool:
        """Whether there is anything to compare the processor with."""
        return self.device == "cuda"

    @property
    def other(self) -> str:
        """The second side of a comparison."""
        return "GPU" if self.on_gpu else "CPU again (no GPU asked for)"

    def wait(self) -> None:
        """Until the device has done all it was given."""
        if self.on_gpu:
            torch.cuda.synchronize()


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table."""

    what: str
    value: float | None
    """None: not run, and `note` says why."""
    unit: str = ""
    aim: str = ""
    met: bool | None = None
    """None where there is no aim."""
    note: str = ""


def at_most(what: str, value: float, limit: float, unit: str = "", note: str = "") -> Row:
    """A row whose value is to be at most `limit`."""
    return Row(
        what=what, value=value, unit=unit, aim=f"<= {limit:g}", met=value <= limit, note=note
    )


def at_least(what: str, value: float, limit: float, unit: str = "", note: str = "") -> Row:
    """A row whose value is to be at least `limit`."""
    return Row(
        what=what, value=value, unit=unit, aim=f">= {limit:g}", met=value >= limit, note=note
    )
