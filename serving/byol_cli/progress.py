"""A progress bar for a training run: epoch, loss, images/s, time left."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from byol_training.pretrain import Progress


@contextmanager
def training_bar(quiet: bool) -> "Iterator[Callable[[Progress], None] | None]":
    """Yields what `pretrain` calls after each step; None if quiet."""
    if quiet:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (
        BarColumn(20),
        TextColumn("{task.fields[facts]}"),
        TimeElapsedColumn(),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task("", total=None, facts="starting")

        def show(now: "Progress") -> None:
            facts = (
                f"epoch {now.epoch:.1f}/{now.epochs:.1f}  loss {now.loss:.3f}"
                f"  {now.images_per_s:,.0f} images/s  {now.seconds_left:.0f} s left"
            )
            bars.update(task, total=now.steps, completed=now.step, facts=facts)

        yield show
