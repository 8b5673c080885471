"""Checkpoints: everything a run needs to go on as if it had never stopped.

A file is a magic word, the sha256 of the rest, and the rest, as `torch.save` writes it. It is
written to a temporary name, synced and renamed: whenever a kill or a power cut comes, the previous
checkpoint is whole. Loading checks the sum, and unpickles nothing but tensors and plain values.
"""

import hashlib
import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from byol_serving.errors import InvalidSource, StoreError
from byol_training.config import TrainConfig
from byol_training.encoders import Encoder, build_encoder

_MAGIC = b"BYOLCKP1"
_KEEP = 2


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The state between two steps."""

    config: dict[str, Any]
    """`TrainConfig.to_dict()`."""
    fingerprint: str
    """Of the images: a run cannot go on with others."""
    step: int
    """Steps done; with the seed it also is the position in the data and of every random draw."""
    steps: int
    """Steps planned: the length of the schedules."""
    seconds: float
    """Training time so far."""
    model: dict[str, Tensor]
    """State of `Byol`: online and target networks, batch-norm buffers included."""
    optimizer: dict[str, Any]
    """State of the optimiser."""
    rng: dict[str, Any]
    """State of torch's global generators, for encoders that draw (dropout)."""
    guard: dict[str, Any] = field(default_factory=dict)
    """State of `guards.SpikeGuard`."""


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Writes a checkpoint atomically and removes all but the newest two.

    Returns:
        Its path, `folder`/step-00001234.ckpt.

    Raises:
        StoreError: it cannot be written; earlier ones are left as they were.
    """
    # Not asdict: it would copy every tensor. The order of fields is part of no promise.
    values = {name: getattr(checkpoint, name) for name in checkpoint.__dataclass_fields__}
    buffer = io.BytesIO()
    torch.save(values, buffer)
    path = folder / f"step-{checkpoint.step:08d}.ckpt"
    payload = buffer.getbuffer()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(path, _MAGIC + hashlib.sha256(payload).digest(), payload)
        for old in list_checkpoints(folder)[:-_KEEP]:
            old.unlink()
    except OSError as error:
        raise StoreError(
            f"checkpoint {path} of {len(payload)} bytes cannot be written ({error.strerror});"
            " make room, then resume the run from the one before"
        ) from error
    return path


def _write(path: Path, head: bytes, payload: memoryview) -> None:
    """Whole or not at all, and lasting."""
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(head)
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in a folder, oldest first; what a killed write left is not among them."""
    return sorted(folder.glob("step-*.ckpt"))


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Reads a checkpoint.

    Args:
        path: a file written by `save_checkpoint`.
        device: where its tensors go.

    Raises:
        InvalidSource: missing, foreign, truncated or altered.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidSource(f"checkpoint {path} cannot be read ({error.strerror})") from error
    head = len(_MAGIC) + 32
    if data[: len(_MAGIC)] != _MAGIC:
        raise InvalidSource(f"{path} is no checkpoint of this version; give one of byol train")
    if hashlib.sha256(data[head:]).digest() != data[len(_MAGIC) : head]:
        raise InvalidSource(
            f"checkpoint {path} is damaged ({len(data)} bytes, wrong sha256);"
            " delete it and the previous one is used"
        )
    values = torch.load(io.BytesIO(data[head:]), map_location=device, weights_only=True)
    return Checkpoint(**values)


def find_checkpoint(where: Path) -> Path:
    """The newest checkpoint of a run directory, or `where` itself if it is a file.

    Raises:
        InvalidSource: there is none.
    """
    if where.is_file():
        return where
    found = list_checkpoints(where / "checkpoints")
    if not found:
        raise InvalidSource(f"no checkpoint in {where}; give a run directory of byol train")
    return found[-1]


def load_encoder(where: Path) -> tuple[Encoder, TrainConfig]:
    """The trained online encoder, all that is kept at the end (paper, section 3.1).

    Args:
        where: a run directory (its newest checkpoint counts) or a checkpoint file.

    Returns:
        The encoder in evaluation mode on the CPU (normalised float [N, 3, S, S] → [N, dim]), and
        the configuration of its run.

    Raises:
        InvalidSource: no checkpoint, or a damaged one.
    """
    path = find_checkpoint(where)
    checkpoint = load_checkpoint(path)
    config = TrainConfig.from_dict(checkpoint.config)
    encoder = build_encoder(config.encoder, config.stem, image_size=config.image_size)
    try:
        encoder.load_state_dict(encoder_state(checkpoint))
    except RuntimeError as error:
        raise InvalidSource(
            f"checkpoint {path} does not fit encoder {config.encoder}; it is of another version"
        ) from error
    return encoder.eval().requires_grad_(False), config


def encoder_state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The online encoder's part of a checkpoint's model."""
    prefix, model = "encoder.", checkpoint.model
    return {k.removeprefix(prefix): v for k, v in model.items() if k.startswith(prefix)}


def capture_rng() -> dict[str, Any]:
    """State of torch's global generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def restore_rng(state: dict[str, Any]) -> None:
    """The inverse of `capture_rng`; GPUs that are no longer there are passed over."""
    torch.set_rng_state(cast(Tensor, state["cpu"]).cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


def _sync_folder(folder: Path) -> None:
    """Makes a rename last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
