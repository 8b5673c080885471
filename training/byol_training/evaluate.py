"""Is the encoder any good? Scores of a run or a bundle, beside the same network untrained and raw
pixels.

The measures are in neighbours.py, probes.py and label_free.py; they look at embeddings only, never
at how those were made.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from byol_serving.bundle import INFO_FILE, load_bundle
from byol_serving.encoder import Encoder
from byol_serving.images import Pixels, Preprocess
from byol_training.checkpoint import load_encoder
from byol_training.config import AugmentConfig, TrainConfig
from byol_training.data import Images, common_labels, list_images, load_images
from byol_training.encoders import build_encoder
from byol_training.label_free import draw_views, score_without_labels
from byol_training.machine import choose_machine
from byol_training.neighbours import Embeddings, Labels, knn_accuracy, retrieval
from byol_training.probes import few_shot, logistic_probe, sgd_probe
from byol_training.served import ServedEncoder

Embed = Callable[[Pixels], Embeddings]
"""uint8 [N, S, S, 3] to L2-normalised float32 [N, D]."""
EVALUATION_FILE = "evaluation.json"
"""Of a run directory: what `evaluate` gave last, for the report."""
_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class LabelledScores:
    """Measures that need labels; all are fractions, 0 .. 1."""

    knn_accuracy: float
    """Weighted vote of 20 neighbours, T = 0.07."""
    precision_at_10: float
    """Of the ten nearest, the part of the query's class."""
    mean_average_precision: float
    """Over the whole ranking."""


@dataclass(frozen=True, kw_only=True)
class ProbeScores:
    """Accuracies of classifiers fitted on the bank's labels and embeddings, 0 .. 1."""

    logistic_accuracy: float
    """L2-regularised logistic regression, L2 chosen on a held-out tenth."""
    sgd_probe_accuracy: float
    """The paper's linear evaluation by SGD, learning rate chosen likewise."""
    few_shot_10_percent: float
    """Logistic regression on a tenth of the labels, mean of three draws."""
    few_shot_1_percent: float
    """On a hundredth of them, one image a class at least."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is evaluated, ready to embed."""

    preprocess: Preprocess
    """How files become its input."""
    embed: Embed
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """What its training drew views from; the paper's where that is not known."""
    untrained: Embed | None = None
    """The same network with fresh weights; None where its architecture is not known."""


def evaluate(
    path: Path, source: Path, queries: Path | None = None, *, device: str = "auto"
) -> dict[str, dict[str, float]]:
    """Scores a run or a bundle beside the same encoder untrained and raw pixels.

    Args:
        path: a run directory, a checkpoint or an encoder bundle.
        source: images to look among; their class sub-folders, if any, are the labels.
        queries: images held back; every sixth of `source` by default.
        device: of a run's encoder: auto, or a torch device name.

    Returns:
        For `trained`, `untrained` and `pixels` the fields of LabelFreeScores and, where there are
        labels, of LabelledScores and ProbeScores; nothing is fitted on `pixels`, and a bundle that
        does not name its training has no `untrained`.

    Raises:
        InvalidSource: no checkpoint, or no images.
        InvalidBundle: a damaged bundle.
        InvalidConfig: a device that is not there.
    """
    subject = open_subject(path, device)
    bank, held = bank_and_queries(source, queries, subject.preprocess)
    scores = {"trained": score(subject.embed, subject, bank, held, probes=True)}
    if subject.untrained is not None:
        scores["untrained"] = score(subject.untrained, subject, bank, held, probes=True)
    scores["pixels"] = score(pixel_embeddings, subject, bank, held, probes=False)
    return scores


def is_run(path: Path) -> bool:
    """Whether `path` is a run directory, rather than a bundle or one checkpoint."""
    return (path / "checkpoints").is_dir()


def open_subject(path: Path, device: str = "auto") -> Subject:
    """A run's newest encoder in PyTorch, or a bundle's in ONNX Runtime; raises as `evaluate`."""
    if (path / INFO_FILE).exists():
        return _bundle_subject(path)
    encoder, config = load_encoder(path)
    chosen = choose_machine(device, "fp32").device
    mean, std = config.augment.mean, config.augment.std
    return Subject(
        preprocess=Preprocess(size=config.image_size),
        embed=ServedEncoder(encoder, mean, std).to(chosen).embed,
        augment=config.augment,
        untrained=untrained(config).to(chosen).embed,
    )


def _bundle_subject(path: Path) -> Subject:
    bundle = load_bundle(path)
    encoder = Encoder(bundle)

    def embed(pixels: Pixels) -> Embeddings:
        starts = range(0, len(pixels), _BATCH)
        return np.concatenate([encoder.embed(pixels[at : at + _BATCH]) for at in starts])

    preprocess, training = bundle.info.preprocess, bundle.info.training
    if not training:
        return Subject(preprocess=preprocess, embed=embed)
    config = TrainConfig.from_dict(training)
    return Subject(
        preprocess=preprocess,
        embed=embed,
        augment=config.augment,
        untrained=untrained(config).embed,
    )


def untrained(config: TrainConfig) -> ServedEncoder:
    """The network of a run with its initial weights; torch's global generators are left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        encoder = build_encoder(config.encoder, config.stem, image_size=config.image_size)
    return ServedEncoder(encoder, config.augment.mean, config.augment.std)


def score(
    embed: Embed, subject: Subject, bank: Images, held: Images, *, probes: bool
) -> dict[str, float]:
    """Every measure of one way to embed: those without labels, and with them where there are any.

    Args:
        embed: under test.
        subject: whose input size and views are used.
        bank: what would be indexed.
        held: the queries; the measures without labels are of them.
        probes: whether to fit classifiers too.
    """
    asked = embed(held.pixels)
    first, second = draw_views(held.pixels, subject.augment, subject.preprocess.size)
    scores = asdict(score_without_labels(asked, (embed(first), embed(second))))
    labels = common_labels(bank, held)
    if labels is not None:
        rows = embed(bank.pixels)
        scores |= asdict(score_with_labels(rows, labels[0], asked, labels[1]))
        if probes:
            scores |= asdict(score_probes(rows, labels[0], asked, labels[1]))
    return scores


def score_with_labels(
    bank: Embeddings, bank_labels: Labels, queries: Embeddings, query_labels: Labels
) -> LabelledScores:
    """Measures by neighbours: the bank is what was indexed, the queries are held back."""
    found = retrieval(bank, bank_labels, queries, query_labels, k=10)
    return LabelledScores(
        knn_accuracy=knn_accuracy(bank, bank_labels, queries, query_labels),
        precision_at_10=found.precision,
        mean_average_precision=found.average_precision,
    )


def score_probes(
    bank: Embeddings, bank_labels: Labels, queries: Embeddings, query_labels: Labels
) -> ProbeScores:
    """Measures by fitted classifiers, with the same arguments."""
    given = (bank, bank_labels, queries, query_labels)
    return ProbeScores(
        logistic_accuracy=logistic_probe(*given).accuracy,
        sgd_probe_accuracy=sgd_probe(*given).accuracy,
        few_shot_10_percent=few_shot(*given, part=0.1),
        few_shot_1_percent=few_shot(*given, part=0.01),
    )


def pixel_embeddings(pixels: Pixels, *, side: int = 32) -> Embeddings:
    """The baseline without an encoder: pixels of each image, standardised, L2-normalised.

    Args:
        pixels: uint8 [N, S, S, 3].
        side: larger images are averaged down to this first, so that any size can be compared.
    """
    parts = []
    for start in range(0, len(pixels), _BATCH):
        planes = torch.from_numpy(pixels[start : start + _BATCH]).permute(0, 3, 1, 2).float()
        if pixels.shape[1] > side:
            planes = F.adaptive_avg_pool2d(planes, side)
        parts.append(planes.flatten(1).numpy())
    flat = np.concatenate(parts)
    flat = flat - flat.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(flat, axis=1, keepdims=True)
    normalised: Embeddings = flat / np.maximum(norms, 1e-6)
    return normalised


def bank_and_queries(
    source: Path, queries: Path | None, preprocess: Preprocess
) -> tuple[Images, Images]:
    """Images to look among and images to ask with, every sixth of `source` where none are given."""

    def load(where: Path, only: list[str] | None = None) -> Images:
        size, resize = preprocess.size, preprocess.resize
        return load_images(
            where, size, resize=resize, only=only, crop_fraction=preprocess.crop_fraction
        )

    if queries is not None:
        return load(source), load(queries)
    names = list_images(source)
    held = names[::6]
    return load(source, sorted(set(names) - set(held))), load(source, held)
