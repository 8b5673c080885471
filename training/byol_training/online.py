"""Scores while training goes on: lines of scores.jsonl in the run directory, for the report.

The images are those of the run. Labels, where the folders give them, are looked at here and nowhere
else in training: they change no weight.
"""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from byol_serving.images import Pixels, Preprocess, to_input
from byol_training.byol import Byol
from byol_training.config import TrainConfig
from byol_training.data import Images
from byol_training.label_free import draw_views, score_without_labels
from byol_training.neighbours import Embeddings, knn_accuracy, neighbour_stability
from byol_training.served import ServedEncoder

SCORES_FILE = "scores.jsonl"
_BANK, _QUERIES = 10_000, 2000  # bounds what a reading costs, however many images there are


class OnlineScores:
    """Scores the online encoder every few epochs; the `on_epoch` of `pretrain`.

    Args:
        images: those of the run; up to 12,000 spread over them are embedded at each reading.
        config: of the run.
        run_dir: where scores.jsonl goes.
        every: epochs between readings.
    """

    def __init__(self, images: Images, config: TrainConfig, run_dir: Path, *, every: int) -> None:
        self.config, self.every = config, every
        self.last: dict[str, float] = {}
        """The newest reading: the fields of LabelFreeScores; from the second on `stability`, part
        of the ten nearest neighbours that were so at the reading before; `knn_accuracy` where
        there are labels."""
        self._file = run_dir / SCORES_FILE
        self._per_epoch = max(1, len(images) // config.batch_size)
        held, bank = _spread_out(len(images))
        self._held, self._bank = (_inputs(images, rows, config) for rows in (held, bank))
        self._views = draw_views(images.squares(held), config.augment, config.image_size)
        self._labels = None if images.labels is None else (images.labels[bank], images.labels[held])
        self._before: Embeddings | None = None

    def __call__(self, model: Byol, step: int) -> None:
        """Scores, if this epoch is one to score after."""
        epoch = step / self._per_epoch
        if not epoch.is_integer() or epoch % self.every:
            return
        augment = self.config.augment
        embed = ServedEncoder(model.encoder, augment.mean, augment.std).to(_device(model)).embed
        rows = embed(self._held)
        self.last = asdict(
            score_without_labels(rows, (embed(self._views[0]), embed(self._views[1])))
        )
        if self._before is not None:
            self.last["stability"] = neighbour_stability(self._before, rows)
        self._before = rows
        if self._labels is not None:
            self.last["knn_accuracy"] = knn_accuracy(
                embed(self._bank), self._labels[0], rows, self._labels[1]
            )
        self._write({"step": step, "epoch": epoch, **self.last})

    def _write(self, reading: dict[str, float]) -> None:
        """Adds a line, in place of those that a run resumed from further back had written."""
        lines = read_scores(self._file.parent)
        kept = [line for line in lines if line["step"] < reading["step"]]
        self._file.write_text("".join(json.dumps(line) + "\n" for line in [*kept, reading]))


def read_scores(run_dir: Path) -> list[dict[str, float]]:
    """The readings of a run so far, oldest first; none if it was not scored."""
    file = run_dir / SCORES_FILE
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]


def _spread_out(count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of queries, every sixth image, and of the bank, the others; at most as many as said."""
    every = np.arange(count)
    held, bank = every[::6], np.delete(every, np.s_[::6])
    return _at_most(held, _QUERIES), _at_most(bank, _BANK)


def _at_most(rows: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    chosen: NDArray[np.int64] = rows[
        np.linspace(0, len(rows) - 1, min(limit, len(rows))).astype(int)
    ]
    return chosen


def _inputs(images: Images, rows: NDArray[np.int64], config: TrainConfig) -> Pixels:
    """As the encoder will be served: stored images may be larger than the views."""
    how = Preprocess(size=config.image_size)
    squares = images.squares(rows)
    if squares.shape[1] == config.image_size:
        return squares
    return np.stack([to_input(square, how) for square in squares])


def _device(model: Byol) -> torch.device:
    return next(model.parameters()).device
