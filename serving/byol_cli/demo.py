"""`byol demo`: the whole path on real images, in minutes."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from byol_cli.output import emit, json_option

if TYPE_CHECKING:
    from byol_cli.demo_run import DemoResult


@click.command()
@click.option(
    "--data",
    default="default",
    show_default=True,
    help="A folder or tar of images; cifar10; or default: the pictures inside scikit-image.",
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo-out"), show_default=True)
@click.option(
    "--train-seconds", default=180.0, show_default=True, help="Time that pretraining may take."
)
@json_option
def command(data: str, out: Path, train_seconds: float, as_json: bool) -> None:
    """Pretrain, export, serve, index and search, and say how well it went.

    \b
    Example:  byol demo
              byol demo --data photos/ --out demo-photos
              byol demo --data cifar10

    A part of the images is held back: it is never trained on, and asks the questions. Class
    sub-folders, if there are any, are used for scoring only.
    """
    from byol_cli.demo_run import run_demo

    result = run_demo(data, out, train_seconds=train_seconds, quiet=as_json)
    if as_json:
        emit(asdict(result), as_json)
    else:
        _print(result, out)


def _print(result: "DemoResult", out: Path) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    scores = Table(
        title=f"{result.queries:,} held-back queries", title_justify="left", box=box.SIMPLE_HEAD
    )
    scores.add_column("embedding")
    scores.add_column("kNN accuracy", justify="right")
    for name, value in (
        ("raw pixels", result.knn_pixels),
        ("the same encoder, untrained", result.knn_untrained),
        ("trained with BYOL, as served", result.knn_trained),
    ):
        scores.add_row(name, "no labels" if value is None else f"{value:.1%}")
    console.print(scores)
    if result.knn_trained is not None and result.knn_untrained is not None:
        best = max(result.knn_untrained, result.knn_pixels or 0.0)
        console.print(_verdict(100 * (result.knn_trained - best)))
    parity = result.parity_max_cosine_distance
    console.print(f"ONNX Runtime against PyTorch: cosine distance at most {parity:.1e}")
    console.print(
        f"{result.indexed:,} images indexed and {result.queries:,} queries answered over gRPC,"
        f" {result.search_p50_ms:.1f} ms each (median, image in, neighbours out)"
    )
    console.print(f"{result.seconds:.0f} s in all\n")
    for name, path in (
        ("bundle", result.bundle),
        ("store", result.store),
        ("picture", result.picture),
    ):
        console.print(f"  {name:8} {path}", soft_wrap=True)
    console.print(
        f"\nNext:\n  byol serve --bundle {result.bundle} --store {result.store}\n"
        f"  byol search {result.example_query} --collection demo     # in another terminal\n"
        f"  byol train YOUR-PHOTOS --out {out / 'run-2'} --epochs 100",
        soft_wrap=True,
    )


def _verdict(points: float) -> str:
    if points >= 15:
        return f"BYOL gained {points:.0f} points over the better of the two baselines."
    if points > 0:
        return (
            f"BYOL gained {points:.1f} points over the better baseline: little. Train longer"
            " (--train-seconds 600), or give it more images."
        )
    return (
        f"BYOL lies {-points:.1f} points below the better baseline. These images need longer"
        " training (--train-seconds 1800) or a larger encoder (byol train --encoder resnet18)."
    )
