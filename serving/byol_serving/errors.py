"""Every error this project raises on purpose.

    ByolError
    ├── InvalidRequest            the caller can mend it by asking differently
    │   ├── InvalidImage          not an image, or a damaged one (has its position in the batch)
    │   │   ├── ImageTooLarge     more bytes or pixels than the limit
    │   │   └── ImageTooSlow      takes longer to decode than the limit
    │   └── InvalidVector         wrong dimension, NaN, infinite or zero
    ├── NotFound
    │   ├── UnknownCollection
    │   ├── UnknownId
    │   └── UnknownModel
    ├── AlreadyExists
    ├── FailedPrecondition        the server's state does not allow it
    │   ├── EncoderMismatch       vectors of one encoder, a collection of another
    │   └── InvalidBundle         truncated, altered, foreign, or its golden check fails
    ├── Overloaded                queue full, quota: try again after `retry_after_s`
    ├── Unavailable               starting or draining
    ├── DeadlinePassed            the deadline passed before the work began
    ├── Unauthenticated / Forbidden
    ├── StoreError                the disk or the database under a collection
    │   ├── StoreLocked           another process owns the store
    │   └── StoreCorrupt          bytes on disk are not what was written
    ├── InvalidConfig             a setting or option that cannot be used
    └── InvalidSource             a data source that cannot be read or holds too few images

Each message is one line that names the value, the limit and the remedy: a person or a log can act
on it. `byol_serving.rpc.status` maps the tree to gRPC codes; a test checks every leaf.
"""


class ByolError(Exception):
    """Base of all errors raised on purpose; `str(error)` is fit to be shown to the caller."""


class InvalidRequest(ByolError):
    """The request cannot be answered as asked."""


class InvalidImage(InvalidRequest):
    """An image that cannot be decoded."""

    def __init__(self, reason: str, position: int | None = None) -> None:
        self.reason = reason
        self.position = position
        super().__init__(reason if position is None else f"image {position}: {reason}")

    def at(self, position: int) -> "InvalidImage":
        """The same error, naming the image's position in its batch."""
        return type(self)(self.reason, position)


class ImageTooLarge(InvalidImage):
    """An image with more bytes or pixels than the limit."""


class ImageTooSlow(InvalidImage):
    """An image that takes longer to decode than the limit."""


class InvalidVector(InvalidRequest):
    """A vector of the wrong dimension, or not finite, or zero."""


class NotFound(ByolError):
    """Something asked for by name does not exist."""


class UnknownCollection(NotFound):
    """No collection of that name."""


class UnknownId(NotFound):
    """No item of that id in the collection."""


class UnknownModel(NotFound):
    """No model of that name, or not that version of it."""


class AlreadyExists(ByolError):
    """Something of that name exists."""


class FailedPrecondition(ByolError):
    """The server's state does not allow it."""


class EncoderMismatch(FailedPrecondition):
    """Vectors of one encoder offered to a collection of another."""


class InvalidBundle(FailedPrecondition):
    """An encoder bundle that is truncated, altered, foreign, or fails its golden check."""


class Overloaded(ByolError):
    """A queue or quota is full: nothing was done."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(ByolError):
    """The server is starting or draining."""


class DeadlinePassed(ByolError):
    """The caller's deadline passed before the work began: nothing was done."""


class Unauthenticated(ByolError):
    """No credentials, or wrong ones."""


class Forbidden(ByolError):
    """Valid credentials that do not allow this."""


class StoreError(ByolError):
    """The disk or the database under a collection failed (disk full, read-only, I/O error)."""


class StoreLocked(StoreError):
    """Another process owns the store."""


class StoreCorrupt(StoreError):
    """Bytes on disk are not what was written."""


class InvalidConfig(ByolError):
    """A setting or option that cannot be used."""


class InvalidSource(ByolError):
    """A data source that cannot be read, or holds too few images."""
