"""What bounds the queue: images and bytes that were accepted and not yet answered, over all steps.

Over it a request is refused at once, before any work is spent on it.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from byol_serving.errors import InvalidRequest, Overloaded

_STREAM_SHARE = 0.75
"""Part of the budget that streams may fill."""


class Budget:
    """Images and bytes that were accepted and are not yet answered."""

    def __init__(
        self, *, max_images: int, max_bytes: int, seconds_per_image: Callable[[], float]
    ) -> None:
        """`seconds_per_image` is the present pace, for the hint when to try again."""
        self.max_images, self.max_bytes = max_images, max_bytes
        self.images = self.bytes = 0
        self._pace = seconds_per_image
        self._waiting: deque[tuple[asyncio.Future[None], Claim]] = deque()

    def claim(self, images: int, size: int) -> "Claim":
        """Room for a request, until the claim's `with` block ends.

        Raises:
            InvalidRequest: there are no images in it, or it would not fit an empty server.
            Overloaded: it does not fit now; with a hint when it might.
        """
        claim = self._possible(images, size)
        if not self._fits(claim, share=1.0):
            raise Overloaded(
                f"{self.images} images ({self.bytes} bytes) are queued and {images} more exceed"
                f" the limit of {self.max_images} images ({self.max_bytes} bytes); try again later",
                retry_after_s=min(10.0, max(0.01, self.images * self._pace())),
            )
        return self._grant(claim)

    async def wait_for(self, images: int, size: int) -> "Claim":
        """As `claim`, but waits for room, first come first served.

        For streams, whose flow control then holds the sender back. They fill three quarters at
        most, so that bulk work leaves room for the requests of people who wait.
        """
        claim = self._possible(images, size)
        if not self._waiting and self._fits(claim, share=_STREAM_SHARE):
            return self._grant(claim)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((future, claim))
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self._give_back(claim)  # granted in the same turn as the cancellation
            raise
        finally:
            self._wake()
        return claim

    def _possible(self, images: int, size: int) -> "Claim":
        if not images:
            raise InvalidRequest("the request has no images; send at least one")
        if images > self.max_images or size > self.max_bytes:
            raise InvalidRequest(
                f"{images} images ({size} bytes with their pixels) can never fit the queue of"
                f" {self.max_images} images ({self.max_bytes} bytes); send fewer in a request"
            )
        return Claim(self, images, size)

    def _fits(self, claim: "Claim", share: float) -> bool:
        """Whether the claim leaves the budget within `share` of its limits, or is alone in it."""
        return self.images == 0 or (
            self.images + claim.images <= self.max_images * share
            and self.bytes + claim.size <= self.max_bytes * share
        )

    def _grant(self, claim: "Claim") -> "Claim":
        self.images += claim.images
        self.bytes += claim.size
        return claim

    def _give_back(self, claim: "Claim") -> None:
        self.images -= claim.images
        self.bytes -= claim.size
        if self._waiting:
            self._wake()

    def _wake(self) -> None:
        while self._waiting:
            future, claim = self._waiting[0]
            if not future.done():
                if not self._fits(claim, share=_STREAM_SHARE):
                    return
                self._grant(claim)
                future.set_result(None)
            self._waiting.popleft()


class Claim:
    """Room in a `Budget`, given back when the `with` block ends."""

    def __init__(self, budget: Budget, images: int, size: int) -> None:
        """Made by the budget only."""
        self._budget, self.images, self.size = budget, images, size

    def __enter__(self) -> Self:
        """The claim itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Gives the room back, and wakes who waits for it."""
        self._budget._give_back(self)
