"""Does it learn? kNN accuracy on CIFAR-10 as training goes on: ours, lightly's BYOL, raw pixels.

    nice .venv/bin/python benchmarks/proof_cifar.py --out runs/proof --epochs 32

Both learn from the same files with the same encoder from the same initial weights, with the same
batch size and number of steps, each with its own published settings (lightly's: see
peers/lightly_quality.py), at the same time in two processes. After every epoch the encoder is kept;
kept encoders are then scored by the same code, with labels and without, and the curves drawn. A
run of ours that was stopped goes on, lightly's begins anew unless it is finished; `--score-only`
scores what is not scored yet, and draws what there is so far.

On a machine with an NVIDIA GPU, the 200-epoch recipe (ResNet-18, all 50,000 images, batch 256):

    .venv/bin/python benchmarks/proof_cifar.py --out runs/proof200 --gpu
"""

import argparse
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from proof_picture import Curve, draw
from scipy.stats import spearmanr

import harness
from byol_serving.images import Pixels, Preprocess
from byol_training import evaluate
from byol_training.byol import Byol
from byol_training.config import AugmentConfig, TrainConfig
from byol_training.data import Images, common_labels, list_images, load_images
from byol_training.evaluate import Embed, Subject, pixel_embeddings, untrained
from byol_training.neighbours import Embeddings, knn_accuracy, neighbour_stability
from byol_training.pretrain import pretrain
from byol_training.recipes import load_recipe, small_config
from byol_training.served import ServedEncoder
from byol_training.whitening import fit_whitening

CIFAR = Path(__file__).parents[2] / "shared" / "data" / "cifar10"
SIZE = 32
RUNS = ("ours", "lightly")
COLOURS = {"ours": "#1f6fc4", "lightly": "#c2410c"}
LABEL_FREE = ("view_retrieval", "rankme", "alignment", "uniformity", "spread", "stability")
WHITEN_EVERY = 8  # epochs: it takes every embedding once more
IMAGENET = AugmentConfig()
"""Its mean and std are what the encoders of both runs are given."""
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
    json: bool


def main() -> None:
    """Trains, scores, draws; each step only where it is not done yet."""
    plan = options()
    plan.out.mkdir(parents=True, exist_ok=True)
    bank = load(CIFAR / "train.tar", plan.images)
    if plan.train:
        train(plan, bank)
    results = score(plan, bank, load(CIFAR / "test.tar", plan.queries))
    (plan.out / "curves.svg").write_text(picture(results))
    print(summary(results))
    if plan.json:
        print(json.dumps({"benchmark": "proof_cifar", **results}))


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
    parser.add_argument(
        "--quick", action="store_true", help="few images, one epoch: only that it works"
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    given = parser.parse_args()
    if given.quick:
        given.epochs, given.images, given.queries = 1, 1300, 200
    return Plan(
        out=given.out,
        config=gpu_config() if given.gpu else cpu_config(given.epochs),
        images=50_000 if given.gpu else given.images,
        queries=given.queries,
        every=10 if given.gpu else given.every,
        peer=not given.no_peer,
        train=not given.score_only,
        json=given.json,
    )


def cpu_config(epochs: int) -> TrainConfig:
    """The recipe `small`, in float32 as lightly is."""
    return small_config(
        epochs=epochs, device="cpu", precision="fp32", checkpoint_every_epochs=1, log_every=26
    )


def gpu_config() -> TrainConfig:
    """The recipe `cifar` (solo-learn's settings) for 200 epochs, normalised as lightly's views."""
    config = load_recipe("cifar").config
    augment = replace(config.augment, mean=IMAGENET.mean, std=IMAGENET.std)
    return replace(config, epochs=200, device="cuda", augment=augment)


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
    if keep(per_epoch * plan.config.epochs).exists():
        return
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
    results: Results = json.loads(file.read_text()) if file.exists() else {"facts": facts(plan)}
    network = untrained(plan.config).to(plan.config.device)
    subject = Subject(
        preprocess=Preprocess(size=SIZE), embed=network.embed, augment=plan.config.augment
    )
    baselines: dict[str, Embed] = {
        "untrained": network.embed,
        "pixels": pixel_embeddings,
        "standardised": standardised(bank),
    }
    for name, embed in baselines.items():
        if name not in results:
            scores = evaluate.score(embed, subject, bank, queries, probes=False)
            results[name] = {"step": 0, **scores}
    before: dict[str, Embeddings] = {}
    for path in kept(plan):
        run, step = path.parent.name, int(path.stem)
        scored = results.setdefault(run, [])
        if any(point["step"] == step for point in scored):
            continue
        if scored and run not in before:  # stopped here last time
            before[run] = load_into(network, path.with_stem(f"{scored[-1]['step']:06d}"), queries)
        after = load_into(network, path, queries)
        last = step == results["facts"]["steps"]
        point = {"step": step, **evaluate.score(network.embed, subject, bank, queries, probes=last)}
        if step % (WHITEN_EVERY * (plan.images // plan.config.batch_size)) == 0:
            point["whitened_knn_accuracy"] = whitened_accuracy(network, bank, queries)
        if run in before:
            point["stability"] = neighbour_stability(before[run], after)
        before[run] = after
        scored.append(point)
        print(f"{run} {step}: kNN {point['knn_accuracy']:.4f}", flush=True)
        file.write_text(json.dumps(results, indent=1) + "\n")
    results["spearman"] = correlations(results)
    file.write_text(json.dumps(results, indent=1) + "\n")
    return results


def whitened_accuracy(network: ServedEncoder, bank: Images, queries: Images) -> float:
    """Accuracy by kNN as `byol export --whiten` would serve the network, fitted on the bank."""
    labels = common_labels(bank, queries)
    assert labels is not None
    rows = network.embed(bank.pixels, normalised=False)
    white = ServedEncoder(network.encoder, IMAGENET.mean, IMAGENET.std, fit_whitening(rows))
    white.to(network.scale.device)
    return knn_accuracy(white.embed(bank.pixels), labels[0], white.embed(queries.pixels), labels[1])


def standardised(bank: Images) -> Embed:
    """Pixels, each made mean 0 and deviation 1 over the bank; the other baseline, weaker here."""
    mean, std = bank.pixels.mean(axis=0), bank.pixels.std(axis=0)

    def embed(pixels: Pixels) -> Embeddings:
        rows = ((pixels - mean) / std).reshape(len(pixels), -1)
        return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)

    return embed


def kept(plan: Plan) -> list[Path]:
    """Weights to score, early ones first: curves that are stopped end at the same step."""
    paths: list[Path] = []
    for run in RUNS:
        every = sorted((plan.out / "snapshots" / run).glob("*.pt"))
        paths += every[plan.every - 1 :: plan.every]
    return sorted(paths, key=lambda path: (path.stem, path.parent.name))


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

    For each run over its own checkpoints, and over those of both; where there are three at least.
    """
    groups = {run: results[run] for run in RUNS if run in results}
    groups["both"] = [point for points in groups.values() for point in points]
    found: dict[str, dict[str, float]] = {measure: {} for measure in LABEL_FREE}
    for measure, by_group in found.items():
        for name, points in groups.items():
            pairs = [(each[measure], each["knn_accuracy"]) for each in points if measure in each]
            if len(pairs) > 2:
                by_group[name] = float(spearmanr(*zip(*pairs, strict=True)).statistic)
    return found


def summary(results: Results) -> str:
    """A few lines for the terminal."""
    lines = [
        f"kNN accuracy: {name} {results[name]['knn_accuracy']:.4f}"
        for name in ("untrained", "pixels", "standardised")
    ]
    lines += [
        f"  {run} at step {results[run][-1]['step']}: {results[run][-1]['knn_accuracy']:.4f}"
        for run in RUNS
        if run in results
    ]
    lines.append("Spearman correlation with kNN accuracy over checkpoints")
    for measure, found in results["spearman"].items():
        shown = ", ".join(f"{name} {value:+.2f}" for name, value in found.items())
        lines.append(f"  {measure}: {shown}")
    return "\n".join(lines)


def picture(results: Results) -> str:
    """Both curves, as they are and whitened, over the baselines."""
    curves = {}
    for run in (run for run in RUNS if run in results):
        points = results[run]
        plain = [(p["step"], p["knn_accuracy"]) for p in [results["untrained"], *points]]
        key = "whitened_knn_accuracy"
        white = [(p["step"], p[key]) for p in points if key in p]
        curves[run] = Curve(points=plain, colour=COLOURS[run])
        if white:
            curves[f"{run}, whitened"] = Curve(points=white, colour=COLOURS[run], dashed=True)
    levels = {
        "pixels, per image": results["pixels"]["knn_accuracy"],
        "pixels, standardised": results["standardised"]["knn_accuracy"],
    }
    title = "kNN accuracy on CIFAR-10 test images while training"
    return draw(title, results["facts"]["steps"], curves, levels)


if __name__ == "__main__":
    main()
