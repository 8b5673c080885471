"""Does it learn? kNN accuracy on CIFAR-10 as training goes on: ours, lightly's BYOL, raw pixels.

    nice .venv/bin/python benchmarks/proof_cifar.py --out runs/proof --epochs 32

Both learn from the same files with the same encoder from the same initial weights, with the same
batch size and number of steps, each with its own published settings (lightly's: see
peers/lightly_quality.py), at the same time in two processes. After every epoch the encoder is kept;
kept encoders are then scored by the same code, with labels and without, and the curves drawn. What
exists is not done again; `--score-only` scores and draws what there is so far.

On a machine with an NVIDIA GPU, the 200-epoch recipe (ResNet-18, all 50,000 images, batch 256):

    .venv/bin/python benchmarks/proof_cifar.py --out runs/proof200 --gpu
"""

import argparse
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

import harness
from byol_serving.images import Preprocess
from byol_training import evaluate
from byol_training.byol import Byol
from byol_training.config import AugmentConfig, OptimizerConfig, TrainConfig, ViewConfig
from byol_training.curves import ticks
from byol_training.data import Images, list_images, load_images
from byol_training.evaluate import Embed, Subject, pixel_embeddings, untrained
from byol_training.neighbours import Embeddings, neighbour_stability
from byol_training.pretrain import pretrain
from byol_training.served import ServedEncoder

CIFAR = Path(__file__).parents[2] / "shared" / "data" / "cifar10"
SIZE = 32
RUNS = ("ours", "lightly")
COLOURS = {"ours": "#1f6fc4", "lightly": "#c2410c"}
LABEL_FREE = ("view_retrieval", "rankme", "alignment", "uniformity", "spread", "stability")
Results = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the command line said."""

    out: Path
    config: TrainConfig
    images: int
    queries: int
    every: int
    peer: bool
    train: bool


def main() -> None:
    """Trains, scores, draws; each step only where it is not done yet."""
    plan = options()
    plan.out.mkdir(parents=True, exist_ok=True)
    bank = load(CIFAR / "train.tar", plan.images)
    if plan.train:
        train(plan, bank)
    results = score(plan, bank, load(CIFAR / "test.tar", plan.queries))
    (plan.out / "curves.svg").write_text(draw(results))
    print(summary(results))


def options() -> Plan:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where runs and results go")
    parser.add_argument("--epochs", type=int, default=32)
    parser.add_argument("--images", type=int, default=10_000, help="to learn from and look among")
    parser.add_argument("--queries", type=int, default=10_000, help="test images to ask with")
    parser.add_argument("--every", type=int, default=1, help="epochs between scored encoders")
    parser.add_argument("--gpu", action="store_true", help="the 200-epoch recipe instead")
    parser.add_argument("--no-peer", action="store_true", help="ours only")
    parser.add_argument("--score-only", action="store_true", help="train nothing")
    given = parser.parse_args()
    return Plan(
        out=given.out,
        config=gpu_config() if given.gpu else cpu_config(given.epochs),
        images=50_000 if given.gpu else given.images,
        queries=given.queries,
        every=10 if given.gpu else given.every,
        peer=not given.no_peer,
        train=not given.score_only,
    )


def cpu_config(epochs: int) -> TrainConfig:
    """The recipe `small`, in float32 as lightly is."""
    return TrainConfig.small(
        epochs=epochs, device="cpu", precision="fp32", checkpoint_every_epochs=1, log_every=26
    )


def gpu_config() -> TrainConfig:
    """solo-learn's CIFAR-10 settings (scripts/pretrain/cifar/byol.yaml) for 200 epochs."""
    view = ViewConfig(saturation=0.2, blur_p=0.0)
    return TrainConfig(
        encoder="resnet18",
        stem="small",
        image_size=SIZE,
        batch_size=256,
        epochs=200,
        optimizer=OptimizerConfig(lr=1.0, trust_coefficient=0.02, weight_decay=1e-5),
        augment=AugmentConfig(first=view, second=replace(view, solarise_p=0.2)),
        device="cuda",
    )


def load(source: Path, count: int) -> Images:
    """The first images of every class, `count` in all."""
    names = list_images(source)
    of_class: dict[str, int] = {}
    chosen = []
    for name in names:
        label = name.split("/")[-2]
        of_class[label] = of_class.get(label, 0) + 1
        if of_class[label] <= count // 10:
            chosen.append(name)
    return load_images(source, SIZE, only=chosen)


def train(plan: Plan, bank: Images) -> None:
    """Both runs side by side; snapshots of the encoder lie in OUT/snapshots/RUN."""
    peer = threading.Thread(target=train_peer, args=(plan, bank))
    if plan.peer:
        peer.start()
    train_ours(plan, bank)
    if plan.peer:
        peer.join()


def train_ours(plan: Plan, bank: Images) -> None:
    """`pretrain`, as `byol train` calls it."""
    keep = snapshots(plan, "ours")

    def on_epoch(model: Byol, step: int) -> None:
        torch.save(model.encoder.state_dict(), keep(step))

    pretrain(bank, plan.config, plan.out / "ours", resume=True, on_epoch=on_epoch)


def train_peer(plan: Plan, bank: Images) -> None:
    """The same number of steps, in lightly's environment."""
    keep = snapshots(plan, "lightly")
    per_epoch = plan.images // plan.config.batch_size
    np.save(plan.out / "pixels.npy", bank.pixels)
    setup: dict[str, Any] = {
        "pixels": str(plan.out / "pixels.npy"),
        "encoder": plan.config.encoder,
        "stem": plan.config.stem,
        "batch": plan.config.batch_size,
        "steps": per_epoch * plan.config.epochs,
        "device": plan.config.device,
        "seed": plan.config.seed,
    }
    with harness.Peer("lightly_quality.py", **setup) as lightly:
        for epoch in range(1, plan.config.epochs + 1):
            found = lightly.ask(steps=per_epoch, save=str(keep(epoch * per_epoch)))
            print(f"lightly epoch {epoch} loss {found['loss']:.4f}", flush=True)


def snapshots(plan: Plan, run: str) -> Callable[[int], Path]:
    """Where the weights after a step are kept."""
    folder = plan.out / "snapshots" / run
    folder.mkdir(parents=True, exist_ok=True)
    return lambda step: folder / f"{step:06d}.pt"


def score(plan: Plan, bank: Images, queries: Images) -> Results:
    """Scores every kept encoder that is not scored yet; results.json is written after each."""
    file = plan.out / "results.json"
    network = untrained(plan.config).to(plan.config.device)
    subject = Subject(
        preprocess=Preprocess(size=SIZE), embed=network.embed, augment=plan.config.augment
    )

    def measure(embed: Embed, *, probes: bool = False) -> dict[str, float]:
        return evaluate.score(embed, subject, bank, queries, probes=probes)

    if file.exists():
        results: Results = json.loads(file.read_text())
    else:
        start = {"step": 0, **measure(network.embed)}
        results = {"facts": facts(plan), "pixels": measure(pixel_embeddings), "untrained": start}
    for run in RUNS:
        scored = results.setdefault(run, [])
        paths = sorted((plan.out / "snapshots" / run).glob("*.pt"))[plan.every - 1 :: plan.every]
        for place, path in enumerate(paths):
            if place < len(scored):
                continue
            before = load_into(network, paths[place - 1], queries) if place else None
            after = load_into(network, path, queries)
            step = int(path.stem)
            last = step == results["facts"]["steps"]
            point = {"step": step, **measure(network.embed, probes=last)}
            if before is not None:
                point["stability"] = neighbour_stability(before, after)
            scored.append(point)
            print(f"{run} {step}: kNN {point['knn_accuracy']:.4f}", flush=True)
            file.write_text(json.dumps(results, indent=1) + "\n")
    results["spearman"] = correlations(results)
    file.write_text(json.dumps(results, indent=1) + "\n")
    return results


def load_into(network: ServedEncoder, weights: Path, images: Images) -> Embeddings:
    """Puts kept weights into the network; embeds 2,000 images, for the stability."""
    network.encoder.load_state_dict(torch.load(weights, map_location=network.scale.device))
    return network.embed(images.pixels[:: max(1, len(images) // 2000)])


def facts(plan: Plan) -> dict[str, Any]:
    """What a reader needs to know to repeat it."""
    return {
        "machine": harness.machine(),
        "torch": torch.__version__,
        "lightly": "1.6.0" if plan.peer else None,
        "images": plan.images,
        "queries": plan.queries,
        "steps": plan.config.epochs * (plan.images // plan.config.batch_size),
        "config": plan.config.to_dict(),
    }


def correlations(results: Results) -> dict[str, dict[str, float]]:
    """Spearman's rank correlation of each label-free measure with kNN accuracy over checkpoints.

    For each run over its own checkpoints, and over those of both together.
    """
    groups = {run: results[run] for run in RUNS if len(results[run]) > 2}
    groups["both"] = [point for run in RUNS for point in results[run]]
    return {
        measure: {
            name: spearman(
                [(each[measure], each["knn_accuracy"]) for each in points if measure in each]
            )
            for name, points in groups.items()
        }
        for measure in LABEL_FREE
    }


def spearman(pairs: Sequence[tuple[float, float]]) -> float:
    """Correlation of the ranks, -1 .. 1."""
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)


def summary(results: Results) -> str:
    """A few lines for the terminal."""
    lines = [
        f"kNN accuracy: pixels {results['pixels']['knn_accuracy']:.4f},"
        f" untrained {results['untrained']['knn_accuracy']:.4f}"
    ]
    lines += [
        f"  {run} at step {results[run][-1]['step']}: {results[run][-1]['knn_accuracy']:.4f}"
        for run in RUNS
        if results[run]
    ]
    lines.append("Spearman correlation with kNN accuracy over checkpoints")
    for measure, found in results["spearman"].items():
        shown = ", ".join(f"{name} {value:+.2f}" for name, value in found.items())
        lines.append(f"  {measure}: {shown}")
    return "\n".join(lines)


def draw(results: Results) -> str:
    """Both curves and the baselines as one SVG, readable on white and on black."""
    curves = {run: [results["untrained"], *results[run]] for run in RUNS if results[run]}
    values = [point["knn_accuracy"] for curve in curves.values() for point in curve]
    base = {"raw pixels": results["pixels"]["knn_accuracy"]}
    x_ticks = ticks(0, results["facts"]["steps"], 5)
    y_ticks = ticks(min(*values, *base.values()), max(*values, *base.values()), 5, padded=True)

    def place(step: float, accuracy: float) -> str:
        x = 60 + step / x_ticks[-1] * 560
        return f"{x:.1f} {370 - (accuracy - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * 320:.1f}"

    parts = [
        f'<path d="M{place(0, tick)}H620" stroke="#ddd"/>'
        f'<text x="52" y="{float(place(0, tick).split()[1]) + 4:.1f}" text-anchor="end">'
        f"{100 * tick:.0f}%</text>"
        for tick in y_ticks
    ]
    parts += [
        f'<text x="{place(tick, 0).split()[0]}" y="390" text-anchor="middle">{tick:,.0f}</text>'
        for tick in x_ticks
    ]
    for name, accuracy in base.items():
        height = float(place(0, accuracy).split()[1])
        parts.append(
            f'<path d="M{place(0, accuracy)}H620" stroke="#666" stroke-dasharray="5 4"/>'
            f'<text x="626" y="{height + 4:.1f}">{name} {100 * accuracy:.1f}%</text>'
        )
    for run, curve in curves.items():
        points = [place(point["step"], point["knn_accuracy"]) for point in curve]
        x, y = map(float, points[-1].split())
        end = f"{run} {100 * curve[-1]['knn_accuracy']:.1f}%"
        line = f'fill="none" stroke="{COLOURS[run]}" stroke-width="2.5"'
        parts.append(
            f'<path d="M{"L".join(points)}" {line}/>'
            f'<circle cx="{x}" cy="{y}" r="4" fill="{COLOURS[run]}"/>'
            f'<text x="{x + 8}" y="{y + 4}" fill="{COLOURS[run]}" font-weight="600">{end}</text>'
        )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 780 420" font-size="13"'
        ' font-family="sans-serif" fill="#222"><rect width="780" height="420" fill="#fff"/>'
        '<text x="60" y="24" font-size="15" font-weight="600">kNN accuracy on CIFAR-10 test images'
        f" by training step</text>{''.join(parts)}"
        '<text x="340" y="410" text-anchor="middle">optimiser steps</text></svg>\n'
    )


if __name__ == "__main__":
    main()
