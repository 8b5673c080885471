"""What `byol embed` and `byol index` share: options, engines, the progress bar, the ending."""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import click

from byol_cli.output import emit
from byol_cli.progress import bar, left

if TYPE_CHECKING:
    from byol_serving.bundle import Bundle
    from byol_serving.encoder import Device, Encoder
    from byol_serving.indexing.plan import EmbedPlan, Progress, Summary
    from byol_serving.indexing.sinks import Sink

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


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What runs the stages, and on which devices."""

    kind: Literal["local", "ray"]
    ray_address: str | None
    device: "Device"
    gpus: str | None
    threads: int

    def run(
        self,
        plan: "EmbedPlan",
        bundle: "Bundle",
        sink: "Sink",
        on_progress: "Callable[[Progress], None] | None",
    ) -> "Summary":
        """The whole run."""
        match self.kind:
            case "local":
                from byol_serving.indexing import pipeline

                encoders = load_encoders(bundle, self.device, self.gpus, self.threads)
                return pipeline.run(plan, encoders, sink, on_progress=on_progress)
            case "ray":
                from byol_serving.indexing import ray_engine

                if self.gpus is not None:
                    raise click.UsageError("--gpus is for --engine local; Ray gives out its own")
                return ray_engine.run(
                    plan,
                    bundle,
                    sink,
                    address=self.ray_address,
                    device=self.device,
                    on_progress=on_progress,
                )


_ENGINE_OPTIONS = (
    click.option(
        "--bundle",
        "bundle_path",
        type=click.Path(path_type=Path),
        required=True,
        help="Encoder bundle.",
    ),
    click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda", "tensorrt"]),
        default="auto",
        show_default=True,
        help="Where the encoder runs.",
    ),
    click.option("--gpus", help="Which GPUs, like 0,1,3: an encoder on each. Default: 0."),
    click.option("--threads", default=0, help="Of one batch on a CPU; default: by its cores."),
    click.option(
        "--engine",
        type=click.Choice(["local", "ray"]),
        default="local",
        show_default=True,
        help="This process, or Ray Data on a cluster.",
    ),
    click.option(
        "--ray-address",
        help="Of a running Ray cluster, or auto; default: one is started on this machine.",
    ),
)


def engine_options(command: Command) -> Command:
    """Adds --bundle, and what `Engine` holds; the command is given an `Engine` as `engine`."""

    @functools.wraps(command)
    def packed(
        *args: Any,
        engine: Literal["local", "ray"],
        ray_address: str | None,
        device: "Device",
        gpus: str | None,
        threads: int,
        **rest: Any,
    ) -> Any:
        chosen = Engine(
            kind=engine, ray_address=ray_address, device=device, gpus=gpus, threads=threads
        )
        return command(*args, engine=chosen, **rest)

    for option in reversed(_ENGINE_OPTIONS):
        packed = option(packed)
    return cast(Command, packed)


def quiet_option(command: Command) -> Command:
    """Adds --quiet."""
    decorate = click.option("--quiet", "-q", is_flag=True, help="No progress bar.")
    return decorate(command)


def load_encoders(
    bundle: "Bundle", device: "Device", gpus: str | None, threads: int
) -> "list[Encoder]":
    """An encoder a device, each as often as it takes batches at a time.

    They are checked against the bundle's golden pairs.
    """
    from byol_serving.encoder import Encoder

    found = []
    for device_id in gpu_numbers(gpus, device):
        encoder = Encoder(bundle, device=device, threads=threads, device_id=device_id)
        encoder.check_golden()
        found.append(encoder)
    return [encoder for encoder in found for _ in range(encoder.workers)]


def gpu_numbers(gpus: str | None, device: str) -> list[int]:
    """What --gpus names; [0] without it."""
    if gpus is None:
        return [0]
    if device not in ("cuda", "tensorrt"):
        raise click.UsageError("--gpus needs --device cuda or tensorrt")
    try:
        numbers = sorted({int(each) for each in gpus.split(",")})
    except ValueError:
        raise click.BadParameter(
            f"{gpus!r} is not a list of numbers, like 0,1,3", param_hint="--gpus"
        ) from None
    if numbers[0] < 0:
        raise click.BadParameter(f"{numbers[0]} is no GPU's number", param_hint="--gpus")
    return numbers


@contextmanager
def offline_bar(quiet: bool) -> "Iterator[Callable[[Progress], None] | None]":
    """Yields what `pipeline.run` calls; None if quiet."""
    with bar(quiet) as show:
        if show is None:
            yield None
            return

        def tell(now: "Progress") -> None:
            show(now.total, now.done + now.skipped + now.rejected + now.duplicates, facts(now))

        yield tell


def facts(now: "Progress") -> str:
    """A run's pace and where its time goes; the stage near 100% is the bottleneck."""
    busy = " ".join(f"{stage} {part:.0%}" for stage, part in now.busy.items())
    bad = f"  {now.rejected} rejected" if now.rejected else ""
    pace = f"{now.rate:,.0f} images/s{left(now.seconds_left)}"
    return f"{pace}  {busy}  {now.peak_rss / 2**20:,.0f} MB{bad}"


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
