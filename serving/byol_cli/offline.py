"""What `byol embed` and `byol index` share: options, the encoders, the progress bar, the ending."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from byol_cli.output import emit

if TYPE_CHECKING:
    from byol_serving.bundle import Bundle
    from byol_serving.encoder import Device, Encoder
    from byol_serving.indexing.plan import Progress, Summary

Command = TypeVar("Command", bound=Callable[..., Any])

SOME_REJECTED = 3
"""Exit code, see `byol_cli.main`."""

_OPTIONS = (
    click.option(
        "--ids",
        type=click.Choice(["name", "sha256"]),
        default="name",
        show_default=True,
        help="An item's id: its name in the source, or the hash of its file.",
    ),
    click.option(
        "--sync",
        is_flag=True,
        help="Take over changes: embed what is new or changed, try rejected files again, remove"
        " what is gone.",
    ),
    click.option(
        "--shard-size",
        default=4096,
        show_default=True,
        help="Images a shard; what a stop costs at most.",
    ),
    click.option(
        "--batch-size", default=64, show_default=True, help="Images a call of the encoder."
    ),
    click.option("--decode-threads", default=0, help="Default: one per processor."),
    click.option(
        "--in-flight",
        default=0,
        help="Images in memory at most; default: by batch size and threads.",
    ),
    click.option("--image-column", help="Parquet column of image bytes or paths."),
    click.option("--id-column", help="Parquet column of unique names."),
)


def plan_options(command: Command) -> Command:
    """Adds the fields of `EmbedPlan` as options."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def encoder_options(command: Command) -> Command:
    """Adds --bundle, --device and --threads."""
    for option in (
        click.option("--threads", default=0, help="Of the encoder on a CPU; default: all."),
        click.option(
            "--device",
            type=click.Choice(["auto", "cpu", "cuda"]),
            default="auto",
            show_default=True,
            help="Where the encoder runs.",
        ),
        click.option(
            "--bundle",
            "bundle_path",
            type=click.Path(path_type=Path),
            required=True,
            help="Encoder bundle.",
        ),
    ):
        command = option(command)
    return command


def quiet_option(command: Command) -> Command:
    """Adds --quiet."""
    decorate = click.option("--quiet", "-q", is_flag=True, help="No progress bar.")
    return decorate(command)


def load_encoders(bundle: "Bundle", device: "Device", threads: int) -> "list[Encoder]":
    """The encoders of a run, checked against the bundle's golden pairs."""
    from byol_serving.encoder import Encoder

    encoder = Encoder(bundle, device=device, threads=threads)
    encoder.check_golden()
    return [encoder]


@contextmanager
def offline_bar(quiet: bool) -> "Iterator[Callable[[Progress], None] | None]":
    """Yields what `pipeline.run` calls; None if quiet."""
    if quiet:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (
        BarColumn(20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeElapsedColumn(),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task("", total=None, facts="starting")

        def show(now: "Progress") -> None:
            met = now.done + now.skipped + now.rejected + now.duplicates
            bars.update(task, total=now.total, completed=met, facts=facts(now))

        yield show


def facts(now: "Progress") -> str:
    """A run's pace and where its time goes; the stage near 100% is the bottleneck."""
    busy = " ".join(f"{stage} {part:.0%}" for stage, part in now.busy.items())
    left = "" if now.seconds_left is None else f"  {now.seconds_left:.0f} s left"
    bad = f"  {now.rejected} rejected" if now.rejected else ""
    return f"{now.rate:,.0f} images/s{left}  {busy}  {now.peak_rss / 2**20:,.0f} MB{bad}"


def finish(summary: "Summary", as_json: bool) -> None:
    """Prints the summary; exits with 3 where files were rejected."""
    found = asdict(summary)
    if not as_json:
        found["busy"] = [f"{stage} {part:.0%}" for stage, part in summary.busy.items()]
        found["peak_rss"] = f"{summary.peak_rss / 2**20:.0f} MB"
        del found["seconds_left"]
    emit(found, as_json)
    if summary.rejected:
        print(
            f"byol: {summary.rejected} files were rejected; {summary.rejected_file} says why",
            file=sys.stderr,
        )
        sys.exit(SOME_REJECTED)
