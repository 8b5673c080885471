"""Batches of view pairs: a pure function of seed and step, so that resuming changes none."""

import hashlib

import torch
from torch import Tensor

from byol_training.augment import two_views
from byol_training.config import TrainConfig
from byol_training.data import Images

_DEVICE_SHARE = 0.4  # of free GPU memory that the images may take; the step needs the rest


class Feed:
    """Shuffles, batches and augments.

    Args:
        images: all of them; on a GPU with room they are copied there once.
        config: seed, views and their size.
        batch_size: images per step; the last, incomplete batch of an epoch is dropped.
        device: where views are made.
    """

    def __init__(
        self, images: Images, config: TrainConfig, batch_size: int, device: torch.device
    ) -> None:
        self.config = config
        self.batch_size = batch_size
        self.device = device
        self.steps_per_epoch = len(images) // batch_size
        self._pixels = torch.from_numpy(images.pixels)
        if device.type == "cuda" and self._fits_on_device():
            self._pixels = self._pixels.to(device)
        self._generator = torch.Generator()
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def views(self, step: int) -> tuple[Tensor, Tensor]:
        """The two views of step `step`'s images: float32 [batch, 3, S, S] twice, channels last."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, shuffle(self.config.seed, epoch, len(self._pixels))
        index = self._order[position * self.batch_size : (position + 1) * self.batch_size]
        self._generator.manual_seed(derive(self.config.seed, "views", step))
        first, second = two_views(
            self._batch(index), self.config.augment, self.config.image_size, self._generator
        )
        layout = torch.channels_last
        return first.contiguous(memory_format=layout), second.contiguous(memory_format=layout)

    def _batch(self, index: Tensor) -> Tensor:
        if self._pixels.device.type != "cpu":
            return self._pixels[index.to(self.device, non_blocking=True)]
        batch = self._pixels[index]
        if self.device.type == "cuda":
            batch = batch.pin_memory()
        return batch.to(self.device, non_blocking=True)

    def _fits_on_device(self) -> bool:
        free, _total = torch.cuda.mem_get_info(self.device)
        return self._pixels.nbytes < _DEVICE_SHARE * free


def shuffle(seed: int, epoch: int, count: int) -> Tensor:
    """The order of the images in an epoch: int64 [count]."""
    generator = torch.Generator().manual_seed(derive(seed, "shuffle", epoch))
    return torch.randperm(count, generator=generator)


def derive(seed: int, purpose: str, number: int) -> int:
    """A 63-bit seed for one purpose at one place: unrelated for any two, the same anywhere."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
