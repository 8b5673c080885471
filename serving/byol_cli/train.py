"""`byol train`: pretrain an encoder on unlabelled images."""

import dataclasses
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from byol_cli.output import emit, json_option
from byol_cli.progress import training_bar
from byol_serving.errors import InvalidConfig


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Run directory.")
@click.option(
    "--config",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Settings as JSON, as in a run's config.json; default: small pictures on a CPU.",
)
@click.option("--encoder", type=click.Choice(["small", "resnet18", "resnet34", "resnet50"]))
@click.option("--stem", type=click.Choice(["imagenet", "small"]), help="small: under 100 pixels.")
@click.option("--image-size", type=int, help="Side of the views in pixels.")
@click.option("--batch-size", type=int, help="Images in one step.")
@click.option("--epochs", type=int, help="Passes over the images.")
@click.option("--max-seconds", type=float, help="Choose the epochs so that the run ends by then.")
@click.option("--seed", type=int)
@click.option("--device", help="auto, cpu or cuda.")
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]))
@click.option(
    "--store-scale",
    type=click.FloatRange(1.0, 4.0),
    default=1.0,
    show_default=True,
    help="Side of the stored images over the views': 1.5 keeps detail for small crops.",
)
@click.option(
    "--eval-every",
    type=click.IntRange(min=1),
    help="Epochs between scores while training: kNN where there are labels, and label-free.",
)
@click.option("--resume", is_flag=True, help="Go on from the run's last checkpoint.")
@json_option
def command(
    source: Path,
    out: Path,
    config: Path | None,
    store_scale: float,
    eval_every: int | None,
    resume: bool,
    as_json: bool,
    **changes: Any,
) -> None:
    """Pretrain an encoder with BYOL on the images in SOURCE, a folder or a tar.

    \b
    Example:  byol train photos/ --out runs/photos --epochs 100
              byol train photos/ --out runs/photos --encoder resnet18 --image-size 96
              byol train photos/ --out runs/photos --resume

    Labels are never learned from. The run directory holds config.json, metrics.jsonl,
    rejected.jsonl and checkpoints; stop it with Ctrl-C and go on with --resume.
    """
    from byol_training.config import TrainConfig
    from byol_training.data import load_images
    from byol_training.online import OnlineScores
    from byol_training.pretrain import Progress, pretrain

    if resume and config is None and (out / "config.json").exists():
        config = out / "config.json"
    settings = _read(config) if config else TrainConfig.small()
    given = {name: value for name, value in changes.items() if value is not None}
    settings = dataclasses.replace(settings, **given)
    images = load_images(source, round(settings.image_size * store_scale))
    scores = OnlineScores(images, settings, out, every=eval_every) if eval_every else None
    last: list[Progress] = []
    with training_bar(quiet=as_json) as on_step:

        def follow(now: Progress) -> None:
            last[:] = [now]
            if on_step is not None:
                on_step(now)

        pretrain(images, settings, out, resume=resume, on_step=follow, on_epoch=scores)
    emit(
        {
            "run": out,
            "images": len(images.names),
            "rejected": len(images.rejected),
            **(asdict(last[0]) if last else {}),
            **({f"eval_{name}": value for name, value in scores.last.items()} if scores else {}),
            "next": f"byol export {out} --out bundles/{out.name}",
        },
        as_json,
    )


def _read(path: Path) -> Any:
    from byol_training.config import TrainConfig

    try:
        return TrainConfig.from_dict(json.loads(path.read_text()))
    except ValueError as error:
        raise InvalidConfig(f"{path} is not JSON ({error}); see a run's config.json") from error
