"""`byol train`: pretrain an encoder on unlabelled images."""

import dataclasses
import json
import os
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from byol_cli.output import emit, json_option, table
from byol_cli.progress import training_bar
from byol_serving.errors import InvalidConfig

if TYPE_CHECKING:
    from byol_training.config import TrainConfig
    from byol_training.data import Images
    from byol_training.online import OnlineScores
    from byol_training.parallel import World
    from byol_training.pretrain import Progress


def _seconds(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """30m, 2h, 1h30m, 90s or 90: seconds."""
    if value is None:
        return None
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", value.strip())
    if found is None or not any(found.groups()):
        raise click.BadParameter(f"{value!r} is no duration; write it as 30m, 2h, 1h30m or 90s")
    hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(3600 * hours + 60 * minutes + seconds)


@click.command()
@click.argument("source", type=click.Path(path_type=Path), required=False)
@click.option("--out", type=click.Path(path_type=Path), help="Run directory.")
@click.option(
    "--recipe", help="Settings that were published together; `list` shows them. Default: small."
)
@click.option(
    "--config",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Settings as JSON, as in a run's config.json.",
)
@click.option(
    "--budget",
    callback=_seconds,
    metavar="TIME",
    help="Measure this machine, choose encoder, sizes and epochs, and end by then: 30m, 2h.",
)
@click.option("--encoder", help="small, resnet18/34/50/101, convnext_tiny/small/base, timm:NAME.")
@click.option("--start-from", help="Weights to start from: a run, a bundle, a file, or timm.")
@click.option("--stem", type=click.Choice(["imagenet", "small"]), help="small: under 100 pixels.")
@click.option("--image-size", type=int, help="Side of the views in pixels.")
@click.option("--batch-size", type=int, help="Images in one step, over all processes.")
@click.option("--accumulate", type=int, help="Micro-batches that a step is split into.")
@click.option("--epochs", type=int, help="Passes over the images.")
@click.option("--max-seconds", type=float, help="Choose the epochs so that the run ends by then.")
@click.option("--seed", type=int)
@click.option("--device", help="auto, cpu or cuda.")
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]))
@click.option(
    "--compile", type=click.Choice(["auto", "on", "off", "graphs"]), help="torch.compile."
)
@click.option("--tensorboard", is_flag=True, default=None, help="Write curves for it, too.")
@click.option(
    "--store-scale",
    type=click.FloatRange(1.0, 4.0),
    help="Side of the stored images over the views'; by default what the pictures offer, up to 2.",
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of decoded images, used again by later runs; by default in the run directory.",
)
@click.option(
    "--eval-every",
    type=click.IntRange(min=1),
    help="Epochs between scores while training: kNN where there are labels, and label-free.",
)
@click.option("--resume", is_flag=True, help="Go on from the run's last checkpoint.")
@json_option
def command(
    source: Path | None,
    out: Path | None,
    recipe: str | None,
    config: Path | None,
    budget: float | None,
    store_scale: float | None,
    cache: Path | None,
    eval_every: int | None,
    resume: bool,
    as_json: bool,
    **changes: Any,
) -> None:
    """Pretrain an encoder with BYOL on the images in SOURCE.

    \b
    Example:  byol train photos/ --out runs/photos --budget 30m
              byol train photos/ --out runs/photos --recipe photos --epochs 200
              byol train 'shards-{0000..0127}.tar' --out runs/web --recipe photos
              byol train photos/ --out runs/photos --resume
              byol train --recipe list

    SOURCE is a folder, a tar archive, several of them, Parquet files, or a .txt list of paths.
    Labels are never learned from. The run directory holds config.json, metrics.jsonl,
    rejected.jsonl and checkpoints; stop it with Ctrl-C and go on with --resume. Start it with
    torchrun to use several devices. Every setting is explained in docs/training.md.
    """
    started = time.monotonic()
    if recipe == "list":
        _show_recipes(as_json)
        return
    if source is None or out is None:
        raise click.UsageError("give SOURCE and --out, or --recipe list")
    given = {name: value for name, value in changes.items() if value is not None}
    from byol_training.machine import use_processors
    from byol_training.online import OnlineScores
    from byol_training.parallel import joined

    use_processors(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if resume and config is None and (out / "config.json").exists():
        config = out / "config.json"
    ends = None if budget is None else started + budget
    chosen = _Chosen(recipe=recipe, config=config, changes=given, ends=ends, resume=resume)
    with joined(given.get("device", "auto")) as world:
        settings, images = _prepare(source, chosen, store_scale, cache or out / "cache", world)
        scores = OnlineScores(images, settings, out, every=eval_every) if eval_every else None
        last = _train(
            images, settings, out, scores, resume=resume, quiet=as_json or not world.leads
        )
        if world.leads:
            _report(out, images, last, scores, as_json=as_json)


@dataclass(frozen=True, kw_only=True)
class _Chosen:
    """What the command line says about the settings."""

    recipe: str | None
    config: Path | None
    changes: dict[str, Any]
    ends: float | None
    """Of the budget, by the monotonic clock; None without."""
    resume: bool


def _prepare(
    source: Path, chosen: _Chosen, store_scale: float | None, cache: Path, world: "World"
) -> "tuple[TrainConfig, Images]":
    """The settings, planned where that was left to us, and the images at the side they want."""
    from byol_training.survey import survey

    found = world.decide(survey(source) if world.leads else None)
    settings = _settings(chosen.recipe, chosen.config, chosen.changes)
    if chosen.ends is not None and not (
        chosen.recipe or chosen.config or "encoder" in chosen.changes
    ):
        left = chosen.ends - time.monotonic()
        settings = world.decide(_planned(found, left, chosen.changes) if world.leads else None)
    side = found.stored_side(settings.image_size)
    if store_scale is not None:
        side = round(settings.image_size * store_scale)
    images = _load(source, side, cache, world)
    if chosen.ends is not None and not (chosen.resume and chosen.config):
        left = max(1.0, chosen.ends - time.monotonic())
        settings = world.decide(dataclasses.replace(settings, max_seconds=left))
    return settings, images


def _report(
    out: Path,
    images: "Images",
    last: "Progress | None",
    scores: "OnlineScores | None",
    *,
    as_json: bool,
) -> None:
    read = scores.last if scores is not None else {}
    emit(
        {
            "run": out,
            "images": len(images),
            "rejected": len(images.rejected),
            **(asdict(last) if last is not None else {}),
            **{f"eval_{name}": value for name, value in read.items()},
            "next": f"byol export {out} --out bundles/{out.name}",
        },
        as_json,
    )


def _settings(recipe: str | None, config: Path | None, given: dict[str, Any]) -> "TrainConfig":
    """Of a file, a recipe, or the recipe `small`, with what was given changed."""
    from byol_training.config import TrainConfig
    from byol_training.recipes import load_recipe

    if recipe and config:
        raise InvalidConfig(f"--recipe {recipe} and --config {config} exclude each other; give one")
    if config is None:
        return dataclasses.replace(load_recipe(recipe or "small").config, **given)
    try:
        values = json.loads(config.read_text())
    except ValueError as error:
        raise InvalidConfig(f"{config} is not JSON ({error}); see a run's config.json") from error
    return dataclasses.replace(TrainConfig.from_dict(values), **given)


def _planned(found: Any, seconds: float, given: dict[str, Any]) -> "TrainConfig":
    """What the budget is best spent on; says so."""
    from byol_training.budget import plan_budget

    plan = plan_budget(found, seconds, device=given.get("device", "auto"))
    for line in plan.reasons:
        print(f"budget: {line}", file=sys.stderr)
    return dataclasses.replace(plan.config, **given)


def _load(source: Path, side: int, cache: Path, world: "World") -> "Images":
    """The leading process decodes; the others then map what it has stored."""
    from byol_training.data import load_images

    images = None
    if world.leads:
        images = load_images(source, side, resize="whole", cache=cache)
    world.decide(None)  # the others wait here
    return images or load_images(source, side, resize="whole", cache=cache)


def _train(
    images: "Images",
    settings: "TrainConfig",
    out: Path,
    scores: "OnlineScores | None",
    *,
    resume: bool,
    quiet: bool,
) -> "Progress | None":
    """Trains under a progress bar; returns the last reading."""
    from byol_training.pretrain import pretrain

    last: list[Progress] = []
    with training_bar(quiet) as show:

        def follow(now: "Progress") -> None:
            last[:] = [now]
            for warning in now.warnings:
                print(f"byol: warning: {warning}", file=sys.stderr)
            if show is not None:
                show(now)

        pretrain(images, settings, out, resume=resume, on_step=follow, on_epoch=scores)
    return last[0] if last else None


def _show_recipes(as_json: bool) -> None:
    from byol_training.recipes import load_recipe, recipe_names

    recipes = {name: load_recipe(name) for name in recipe_names()}
    if as_json:
        emit({name: asdict(recipe) for name, recipe in recipes.items()}, as_json)
        return
    table(("recipe", "for"), [(name, recipe.about) for name, recipe in recipes.items()])
    print()
    for name, recipe in recipes.items():
        print(f"{name}: {recipe.source}" + (f"; {recipe.result}" if recipe.result else ""))
