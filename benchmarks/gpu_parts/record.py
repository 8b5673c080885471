"""Item 3: the CIFAR-10 recipe on the JPEG copy, its accuracy and its wall time."""

import dataclasses
import time

from gpu_parts.rows import Asked, Row, at_least, at_most
from proof_cifar import CIFAR, gpu_config, load

from byol_training.byol import Byol
from byol_training.config import TrainConfig
from byol_training.data import Images, common_labels
from byol_training.neighbours import Embeddings, knn_accuracy
from byol_training.pretrain import pretrain
from byol_training.probes import logistic_probe
from byol_training.recipes import small_config
from byol_training.served import ServedEncoder


def two_hundred_epochs(asked: Asked) -> list[Row]:
    """Recipe `cifar` for 200 epochs; the aim is 88% by kNN within ten minutes."""
    return _run(asked, "200 epochs", _config(asked))


def longest(asked: Asked) -> list[Row]:
    """The same recipe for as long as --record-seconds says."""
    if not asked.record_seconds:
        return [Row(what="longer run", value=None, note="give --record-seconds")]
    config = dataclasses.replace(_config(asked), max_seconds=asked.record_seconds)
    return _run(asked, f"{asked.record_seconds:.0f} s", config)


def _config(asked: Asked) -> TrainConfig:
    if asked.quick:
        return small_config(epochs=1, device=asked.device)
    return dataclasses.replace(gpu_config(), device=asked.device)


def _run(asked: Asked, name: str, config: TrainConfig) -> list[Row]:
    train = load(CIFAR / "train.tar", 1_300 if asked.quick else 50_000)
    test = load(CIFAR / "test.tar", 200 if asked.quick else 10_000)
    curve: list[str] = []
    began = time.perf_counter()
    spent = 0.0  # on the curve, which is no part of training

    def on_epoch(model: Byol, step: int) -> None:
        nonlocal spent
        started = time.perf_counter()
        epoch = step // (len(train) // config.batch_size)
        if epoch % 20 == 0:
            curve.append(f"{epoch}: {100 * _knn(model, config, train, test):.1f}")
        spent += time.perf_counter() - started

    model = pretrain(train, config, asked.scratch / f"record-{name}", on_epoch=on_epoch)
    asked.wait()
    minutes = (time.perf_counter() - began - spent) / 60
    bank, queries = _embedded(model, config, train), _embedded(model, config, test)
    labels = common_labels(train, test)
    assert labels is not None
    linear = logistic_probe(bank, labels[0], queries, labels[1]).accuracy
    accuracy = 100 * knn_accuracy(bank, labels[0], queries, labels[1])
    return [
        at_least(f"CIFAR-10, {name}: kNN", accuracy, 88, "%", note="; ".join(curve)),
        Row(what=f"CIFAR-10, {name}: linear probe", value=100 * linear, unit="%"),
        at_most(f"CIFAR-10, {name}: training", minutes, 10, "minutes"),
    ]


def _knn(model: Byol, config: TrainConfig, train: Images, test: Images) -> float:
    labels = common_labels(train, test)
    assert labels is not None
    bank, queries = _embedded(model, config, train), _embedded(model, config, test)
    return knn_accuracy(bank, labels[0], queries, labels[1])


def _embedded(model: Byol, config: TrainConfig, images: Images) -> Embeddings:
    mean, std = config.augment.mean, config.augment.std
    device = next(model.parameters()).device
    return ServedEncoder(model.encoder, mean, std).to(device).embed(images.pixels)


CHECKS = {"200 epochs": two_hundred_epochs, "the longest run": longest}
