"""`byol export`: a trained run becomes an encoder bundle."""

from pathlib import Path
from typing import Literal

import click

from byol_cli.output import emit, json_option


@click.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Bundle to make.")
@click.option("--name", help="What to call it; default: the run's name.")
@click.option("--size", type=int, help="Input size in pixels; default: the training views'.")
@click.option("--crop-fraction", default=1.0, show_default=True, help="Centre crop when serving.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "int8"]),
    default="fp32",
    show_default=True,
    help="int8 is several times as fast on a CPU.",
)
@click.option(
    "--measure-on",
    type=click.Path(path_type=Path, exists=True),
    help="Labelled images: what the precision costs in kNN accuracy.",
)
@click.option("--features", help="Stages whose dense maps to offer too, like layer3,layer4.")
@click.option(
    "--whiten",
    type=click.Path(path_type=Path, exists=True),
    help="Images, best those trained on: give all directions of the embedding the same variance.",
)
@click.option(
    "--with-weights",
    is_flag=True,
    help="Keep the float32 weights in the bundle, for byol train --start-from.",
)
@click.option("--overwrite", is_flag=True, help="Replace a bundle that stands at --out.")
@json_option
def command(
    run: Path,
    out: Path,
    name: str | None,
    size: int | None,
    crop_fraction: float,
    precision: Literal["fp32", "fp16", "int8"],
    measure_on: Path | None,
    features: str | None,
    whiten: Path | None,
    with_weights: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Turn a trained RUN into an encoder bundle, checked against PyTorch on its own images.

    \b
    Example:  byol export runs/photos --out bundles/photos
              byol export runs/photos --out bundles/photos-int8 --precision int8
              byol export runs/photos --out bundles/photos-white --whiten photos/
    """
    from byol_training.export import export_run

    bundle = export_run(
        run,
        out,
        name=name,
        size=size,
        crop_fraction=crop_fraction,
        precision=precision,
        measure_on=measure_on,
        features=features.split(",") if features else (),
        whiten_on=whiten,
        keep_weights=with_weights,
        overwrite=overwrite,
    )
    emit(
        {
            "bundle": bundle.path,
            "encoder_id": bundle.info.encoder_id,
            "dim": bundle.info.dim,
            "precision": bundle.info.precision,
            "features": [each.name for each in bundle.info.features],
            "input_size": bundle.info.preprocess.size,
            **bundle.info.scores,
            "next": f"byol serve --bundle {out} --store store",
        },
        as_json,
    )
