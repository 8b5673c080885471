"""Batches of views: a pure function of seed and step, so that resuming changes none."""

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from byol_training.augment import apply_views, draw_views
from byol_training.config import TrainConfig
from byol_training.data import Images
from byol_training.machine import send
from byol_training.parallel import World

_DEVICE_SHARE = 0.4  # of free GPU memory that the images may take; the step needs the rest


class Feed:
    """Shuffles, batches and augments.

    The images lie on the device where they fit there. Where they do not, and where they lie on
    disk, the next batch is read, and sent by a stream of its own, while the step works on this one.

    Args:
        images: all of them.
        config: seed, views, their size and the micro-batches.
        batch_size: images per step; the last, incomplete batch of an epoch is dropped.
        device: where views are made.
        world: of whose batches this process makes its part.
    """

    def __init__(
        self,
        images: Images,
        config: TrainConfig,
        batch_size: int,
        device: torch.device,
        world: World | None = None,
    ) -> None:
        self.config = config
        self.batch_size = batch_size
        self.device = device
        self.steps_per_epoch = len(images) // batch_size
        self._names = images.names
        self._world = world or World()
        self._pixels = torch.from_numpy(images.pixels)
        self._shapes = None if images.shapes is None else torch.from_numpy(images.shapes)
        on_gpu = device.type == "cuda"
        held = on_gpu and self._fits_on_device()
        if held:
            self._pixels = self._pixels.to(device)
        ahead = not held and (on_gpu or images.on_disk)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="feed") if ahead else None
        self._stream: torch.cuda.Stream | None = None
        if ahead and on_gpu:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's
        self._next: tuple[tuple[int, int], Future[Tensor]] | None = None
        self._generator = torch.Generator()
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def views(self, step: int, micro: int = 0) -> list[Tensor]:
        """The views of a step's images, of this process's part of micro-batch `micro`.

        Every draw is made for the whole batch, whoever works on it: parts are cut afterwards.

        Returns:
            `config.views` tensors float32 [batch / accumulate / processes, 3, S, S], channels last.
        """
        rows = self._rows(step, micro)
        self._generator.manual_seed(derive(self.config.seed, "views", step))
        draws = draw_views(
            self.config.augment,
            self.batch_size,
            rows.shape[1],
            self._generator,
            views=self.config.views,
            shapes=None if self._shapes is None else self._shapes[self._index(step)],
        )
        part = self._part(micro)
        views = apply_views(
            rows, self.config.augment, [draw.rows(part) for draw in draws], self.config.image_size
        )
        return [view.contiguous(memory_format=torch.channels_last) for view in views]

    def names(self, step: int) -> list[str]:
        """Names of a step's images, of all processes and micro-batches."""
        return [self._names[row] for row in self._index(step).tolist()]

    def _index(self, step: int) -> Tensor:
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, shuffle(self.config.seed, epoch, len(self._names))
        return self._order[position * self.batch_size : (position + 1) * self.batch_size]

    def _part(self, micro: int) -> slice:
        return self._world.part(self.batch_size, self.config.accumulate, micro)

    def _rows(self, step: int, micro: int) -> Tensor:
        """uint8 [B, S, S, 3] on the device; the one after it is sent for."""
        if self._reader is None:
            return self._read(self._index(step)[self._part(micro)])
        place = (step, micro)
        if self._next is not None and self._next[0] == place:
            rows = self._next[1].result()
        else:
            rows = self._read(self._index(step)[self._part(micro)])
        if self._stream is not None:
            working = torch.cuda.current_stream(self.device)
            working.wait_stream(self._stream)
            rows.record_stream(working)  # it was allocated for the other one
        last = micro + 1 == self.config.accumulate
        step, micro = (step + 1, 0) if last else (step, micro + 1)
        index = self._index(step)[self._part(micro)]
        self._next = ((step, micro), self._reader.submit(self._read, index))
        return rows

    def _read(self, index: Tensor) -> Tensor:
        if self._pixels.device.type != "cpu":
            return self._pixels[send(index, self.device)]
        with torch.cuda.stream(self._stream):  # no effect where there is none
            return send(self._pixels[index], self.device)

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
