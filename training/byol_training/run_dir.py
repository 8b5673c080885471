"""The run directory: what a run leaves on disk, and how it goes on from there."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from torch.optim import Optimizer

from byol_serving.errors import InvalidConfig
from byol_training import checkpoint as checkpoints
from byol_training.byol import Byol
from byol_training.config import TrainConfig
from byol_training.data import Images
from byol_training.guards import SpikeGuard
from byol_training.meter import Progress
from byol_training.parallel import World

SAMPLES = 64
SAMPLES_FILE = "samples.npy"
"""Some of the run's images, uint8 [n, S, S, 3]: what export measures parity on."""

# Settings that a resumed run may change: they leave the weights as they would have been
# (device, precision and compile: to within rounding).
_FREE_ON_RESUME = (
    *("device", "precision", "compile", "log_every", "checkpoint_every_epochs", "tensorboard"),
)


class RunDirectory:
    """Writes config.json, metrics.jsonl, rejected.jsonl, samples.npy and checkpoints.

    Args:
        folder: created if missing.
        images: of the run.
        config: of the run.
        model: restored from the newest checkpoint, as `optimizer` and `guard` are, if resuming.
        optimizer: likewise.
        guard: likewise.
        world: only the leading process writes.
        resume: go on from what is there, if anything is.

    Raises:
        InvalidConfig: a run is there and `resume` is off; or it had other settings or images.
        InvalidSource: its newest checkpoint is damaged.
    """

    def __init__(
        self,
        folder: Path,
        images: Images,
        config: TrainConfig,
        model: Byol,
        optimizer: Optimizer,
        guard: SpikeGuard,
        world: World,
        *,
        resume: bool,
    ) -> None:
        self.folder, self._config, self._fingerprint = folder, config, images.fingerprint
        self._model, self._optimizer, self._guard, self._world = model, optimizer, guard, world
        self.step, self.seconds = 0, 0.0
        self.steps: int | None = None
        self._metrics = folder / "metrics.jsonl"
        self._board: Any = None
        found = world.decide(checkpoints.list_checkpoints(folder / "checkpoints"))
        if found and not resume:
            raise InvalidConfig(
                f"{folder} holds a run already ({found[-1].name});"
                " resume it or choose another directory"
            )
        if found:
            self._restore(found[-1])
        if world.leads:
            self._prepare(images)

    def log(self, progress: Progress, **more: float) -> None:
        """A line of metrics.jsonl, and points of TensorBoard's curves if they are wanted."""
        values = dataclasses.asdict(progress) | more
        with self._metrics.open("a") as file:
            file.write(json.dumps(values) + "\n")
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float) and name not in ("step", "steps", "epochs"):
                    self._board.add_scalar(name, value, progress.step)
            self._board.flush()

    def save(self, step: int, steps: int, seconds: float) -> None:
        """A checkpoint; raises StoreError if it cannot be written."""
        if not self._world.leads:
            return
        state = checkpoints.Checkpoint(
            config=self._config.to_dict(),
            fingerprint=self._fingerprint,
            step=step,
            steps=steps,
            seconds=seconds,
            model=self._model.state_dict(),
            optimizer=self._optimizer.state_dict(),
            rng=checkpoints.capture_rng(),
            guard=self._guard.state(),
        )
        checkpoints.save_checkpoint(self.folder / "checkpoints", state)

    def close(self) -> None:
        """Ends TensorBoard's file, if there is one."""
        if self._board is not None:
            self._board.close()

    def _prepare(self, images: Images) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(self.folder / "config.json", json.dumps(self._config.to_dict(), indent=2) + "\n")
        rejected = [json.dumps(dataclasses.asdict(r)) + "\n" for r in images.rejected]
        _write(self.folder / "rejected.jsonl", "".join(rejected))
        rows = np.linspace(0, len(images) - 1, min(SAMPLES, len(images))).astype(int)
        np.save(self.folder / SAMPLES_FILE, images.squares(rows))
        _write(self._metrics, "".join(self._lines_so_far()))
        if self._config.tensorboard:
            # Imported here: it takes seconds, and few want it.
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.step + 1)

    def _restore(self, path: Path) -> None:
        device = next(self._model.parameters()).device
        state = checkpoints.load_checkpoint(path, device)
        _check_same(TrainConfig.from_dict(state.config), self._config)
        if state.fingerprint != self._fingerprint:
            raise InvalidConfig(
                f"{self.folder} was begun on other images (fingerprint {state.fingerprint[:12]},"
                f" now {self._fingerprint[:12]}); give the same ones or choose another directory"
            )
        self._model.load_state_dict(state.model)
        self._optimizer.load_state_dict(state.optimizer)
        if state.guard:
            self._guard.restore(state.guard)
        checkpoints.restore_rng(state.rng)
        self.step, self.steps, self.seconds = state.step, state.steps, state.seconds

    def _lines_so_far(self) -> list[str]:
        """Lines up to the restored step: those after it are about to be written again."""
        if self.step == 0 or not self._metrics.exists():
            return []
        lines = self._metrics.read_text().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("}\n")]
        return [line for line in whole if json.loads(line)["step"] <= self.step]


def _check_same(before: TrainConfig, now: TrainConfig) -> None:
    """Refuses to go on with settings that would bend the run."""
    old, new = before.to_dict(), now.to_dict()
    changed = _differences(old, new)
    if changed:
        raise InvalidConfig(
            f"settings differ from those of the run to resume: {', '.join(changed)};"
            " keep them or choose another directory"
        )


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [
        f"{key} {old[key]} is now {new[key]}"
        for key in old
        if old[key] != new[key] and key not in _FREE_ON_RESUME
    ]


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)
