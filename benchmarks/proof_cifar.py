"""Does it learn? kNN accuracy on CIFAR-10 as training goes on: ours, lightly's BYOL, raw pixels.

    nice .venv/bin/python benchmarks/proof_cifar.py --out runs/proof --epochs 30

Both learn from the same files with the same encoder, the same batch size and the same number of
steps, each with its own published settings (ours: recipe `small` of config.py; lightly's: see
peers/lightly_quality.py), at the same time in two processes. After every epoch the encoder is kept;
kept encoders are then scored by the same code, with labels and without. What exists is not done
again: a run that was stopped goes on.

The 200-epoch recipe for a machine with a GPU:

    .venv/bin/python benchmarks/proof_cifar.py --out runs/proof200 --device cuda \
        --encoder resnet18 --images 50000 --epochs 200 --batch-size 256 --no-peer
"""

import argparse
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from byol_training.byol import Byol
from byol_training.config import TrainConfig
from byol_training.data import Images, list_images, load_images
from byol_training.pretrain import pretrain
from harness import Peer

CIFAR = Path(__file__).parents[2] / "shared" / "data" / "cifar10"
SIZE = 32


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the command line said."""

    out: Path
    config: TrainConfig
    images: int
    queries: int
    peer: bool


def main() -> None:
    """Trains, scores, draws; each step only where it is not done yet."""
    plan = options()
    torch.set_num_threads(torch.get_num_threads())
    bank = load(CIFAR / "train.tar", plan.images)
    train(plan, bank)


def options() -> Plan:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where runs and results go")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--images", type=int, default=10_000, help="to learn from and look among")
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--encoder", default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-peer", action="store_true")
    given = parser.parse_args()
    config = TrainConfig.small(
        epochs=given.epochs,
        batch_size=given.batch_size,
        encoder=given.encoder,
        device=given.device,
        precision="fp32",
        checkpoint_every_epochs=1,
    )
    return Plan(
        out=given.out,
        config=config,
        images=given.images,
        queries=given.queries,
        peer=not given.no_peer,
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
    with Peer("lightly_quality.py", **setup) as lightly:
        for epoch in range(1, plan.config.epochs + 1):
            found = lightly.ask(steps=per_epoch, save=str(keep(epoch * per_epoch)))
            print(f"lightly epoch {epoch} loss {found['loss']:.4f}", flush=True)


def snapshots(plan: Plan, run: str) -> Callable[[int], Path]:
    """Where the weights after a step are kept."""
    folder = plan.out / "snapshots" / run
    folder.mkdir(parents=True, exist_ok=True)
    return lambda step: folder / f"{step:06d}.pt"


if __name__ == "__main__":
    main()
