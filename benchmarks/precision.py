"""Does training in bf16 give what training in fp32 gives? kNN accuracy of both on CIFAR-10.

The same images, the same initial weights, the same draws of views: only the number format of the
networks' forward and backward differs. Recipe `small`, the six-layer encoder. The untrained network
is scored beside them, and so is how near each image's two embeddings are.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from proof_cifar import CIFAR, load

from byol_training.byol import Byol
from byol_training.config import Precision, TrainConfig
from byol_training.data import Images, common_labels
from byol_training.evaluate import untrained
from byol_training.neighbours import Embeddings, knn_accuracy
from byol_training.pretrain import Progress, pretrain
from byol_training.recipes import small_config
from byol_training.served import ServedEncoder
from harness import Rate, options, report

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


def main() -> None:
    """Trains twice, scores three encoders, prints."""
    chosen = options(__doc__ or "")
    count, asked, epochs = (1000, 500, 1) if chosen.quick else (5000, 5000, 5)
    bank, queries = load(CIFAR / "train.tar", count), load(CIFAR / "test.tar", asked)
    config = small_config(epochs=epochs)
    accuracy = scorer(bank, queries)
    fresh = untrained(config)
    results = {"kNN untrained": Rate("%", (accuracy(fresh),))}
    embedded: dict[str, Embeddings] = {}
    ratios: dict[str, float] = {}
    for precision in PRECISIONS:
        started = time.process_time()
        loss, network = train(bank, dataclasses.replace(config, precision=precision))
        ratios[f"cpu_seconds_{precision}"] = time.process_time() - started
        ratios[f"loss_{precision}"] = loss
        results[f"kNN {precision}"] = Rate("%", (accuracy(network),))
        embedded[precision] = network.embed(queries.pixels)
    ratios["bf16_minus_fp32_points"] = results["kNN bf16"].median - results["kNN fp32"].median
    # The mean embedding taken out: what is common to all images would hide what differs.
    one, other = (rows - rows.mean(axis=0) for rows in embedded.values())
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    ratios["cosine_of_embeddings"] = float(np.mean((one * other).sum(axis=1) / lengths))
    facts = {
        "images": len(bank),
        "queries": len(queries),
        "epochs": epochs,
        "batch": config.batch_size,
        "standard error of one accuracy, points": round(50 / len(queries) ** 0.5, 2),
    }
    report("precision", chosen, results, ratios, packages=["torch"], facts=facts)


def train(bank: Images, config: TrainConfig) -> tuple[float, ServedEncoder]:
    """The loss of the last reading, and the encoder as it would be served."""
    losses: list[float] = []

    def follow(now: Progress) -> None:
        losses.append(now.loss)

    with tempfile.TemporaryDirectory() as scratch:
        model: Byol = pretrain(bank, config, Path(scratch) / "run", on_step=follow)
    return losses[-1], ServedEncoder(model.encoder, config.augment.mean, config.augment.std).to(
        next(model.parameters()).device
    )


def scorer(bank: Images, queries: Images) -> Callable[[ServedEncoder], float]:
    """Percent of the queries that their neighbours in the bank classify rightly."""
    labels = common_labels(bank, queries)
    assert labels is not None

    def accuracy(network: ServedEncoder) -> float:
        found = knn_accuracy(
            network.embed(bank.pixels), labels[0], network.embed(queries.pixels), labels[1]
        )
        return 100 * found

    return accuracy


if __name__ == "__main__":
    main()
