"""The progress bar of every command that takes long: how far, how fast, how long yet."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from byol_serving.client_progress import OnProgress
    from byol_serving.client_progress import Progress as CallProgress
    from byol_training.pretrain import Progress


@contextmanager
def bar(
    quiet: bool, *, counts: bool = True
) -> Iterator[Callable[[int | None, int, str], None] | None]:
    """Yields what is told the total, what is done and a line of facts; None if quiet.

    With `counts` the two numbers are shown too.
    """
    if quiet:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (
        BarColumn(20),
        *([MofNCompleteColumn()] if counts else []),
        TextColumn("{task.fields[facts]}"),
        TimeElapsedColumn(),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task("", total=None, facts="starting")

        def show(total: int | None, done: int, facts: str) -> None:
            bars.update(task, total=total, completed=done, facts=facts)

        yield show


@contextmanager
def training_bar(quiet: bool) -> "Iterator[Callable[[Progress], None] | None]":
    """Yields what `pretrain` calls after each step; None if quiet."""
    with bar(quiet, counts=False) as show:
        if show is None:
            yield None
            return

        def tell(now: "Progress") -> None:
            facts = (
                f"epoch {now.epoch:.1f}/{now.epochs:.1f}  loss {now.loss:.3f}"
                f"  {now.images_per_s:,.0f} images/s{left(now.seconds_left)}"
            )
            show(now.steps, now.step, facts)

        yield tell


@contextmanager
def client_bar(quiet: bool) -> "Iterator[OnProgress | None]":
    """Yields what the client's calls take as `progress`; None if quiet."""
    with bar(quiet) as show:
        if show is None:
            yield None
            return

        def tell(now: "CallProgress") -> None:
            show(now.total, now.done, f"{now.rate:,.0f} items/s{left(now.seconds_left)}")

        yield tell


def left(seconds: float | None) -> str:
    """What remains of a run, if that is known."""
    return "" if seconds is None else f"  {seconds:.0f} s left"
