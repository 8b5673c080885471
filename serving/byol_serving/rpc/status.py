"""One table between the error tree and gRPC status codes, read in both directions.

A failed call carries, beside code and one line of text, trailing metadata by which a client can
raise the same class again: `byol-error` (the class), `retry-after-ms` (for Overloaded) and
`byol-image-position` (for a bad image).
"""

from collections.abc import Iterable, Mapping

from grpc import StatusCode

from byol_serving import errors
from byol_serving.errors import ByolError, InvalidImage, InvalidRequest, Overloaded

CODES: Mapping[type[ByolError], StatusCode] = {
    errors.InvalidRequest: StatusCode.INVALID_ARGUMENT,
    errors.InvalidImage: StatusCode.INVALID_ARGUMENT,
    errors.ImageTooLarge: StatusCode.INVALID_ARGUMENT,
    errors.ImageTooSlow: StatusCode.INVALID_ARGUMENT,
    errors.InvalidVector: StatusCode.INVALID_ARGUMENT,
    errors.NotFound: StatusCode.NOT_FOUND,
    errors.UnknownCollection: StatusCode.NOT_FOUND,
    errors.UnknownId: StatusCode.NOT_FOUND,
    errors.UnknownModel: StatusCode.NOT_FOUND,
    errors.AlreadyExists: StatusCode.ALREADY_EXISTS,
    errors.FailedPrecondition: StatusCode.FAILED_PRECONDITION,
    errors.EncoderMismatch: StatusCode.FAILED_PRECONDITION,
    errors.InvalidBundle: StatusCode.FAILED_PRECONDITION,
    errors.Overloaded: StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: StatusCode.UNAVAILABLE,
    errors.DeadlinePassed: StatusCode.DEADLINE_EXCEEDED,
    errors.Unauthenticated: StatusCode.UNAUTHENTICATED,
    errors.Forbidden: StatusCode.PERMISSION_DENIED,
    # Not UNAVAILABLE: trying again does not empty a full disk.
    errors.StoreError: StatusCode.INTERNAL,
    errors.StoreLocked: StatusCode.FAILED_PRECONDITION,
    errors.StoreCorrupt: StatusCode.DATA_LOSS,
    errors.InvalidConfig: StatusCode.FAILED_PRECONDITION,
    errors.InvalidSource: StatusCode.FAILED_PRECONDITION,
}

ERROR_KEY = "byol-error"
RETRY_KEY = "retry-after-ms"
POSITION_KEY = "byol-image-position"

Pairs = tuple[tuple[str, str], ...]

_BY_CODE: Mapping[StatusCode, type[ByolError]] = {
    StatusCode.INVALID_ARGUMENT: errors.InvalidRequest,
    StatusCode.NOT_FOUND: errors.NotFound,
    StatusCode.ALREADY_EXISTS: errors.AlreadyExists,
    StatusCode.FAILED_PRECONDITION: errors.FailedPrecondition,
    StatusCode.UNAVAILABLE: errors.Unavailable,
    StatusCode.DEADLINE_EXCEEDED: errors.DeadlinePassed,
    StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    StatusCode.PERMISSION_DENIED: errors.Forbidden,
}
"""What a code means that came from gRPC itself or from a proxy, without `byol-error`."""


def code_of(error: ByolError) -> StatusCode:
    """The status of an error: its class's, or its nearest ancestor's."""
    for kind in type(error).__mro__:
        if kind in CODES:
            return CODES[kind]
    return StatusCode.INTERNAL


def trailers_of(error: ByolError) -> Pairs:
    """Trailing metadata that tells a client which error it was."""
    pairs: Pairs = ((ERROR_KEY, type(error).__name__),)
    match error:
        case Overloaded():
            return (*pairs, (RETRY_KEY, str(max(1, round(error.retry_after_s * 1000)))))
        case InvalidImage(position=int(position)):
            return (*pairs, (POSITION_KEY, str(position)))
        case _:
            return pairs


def error_from(
    code: StatusCode, text: str, trailers: Iterable[tuple[str, str | bytes]]
) -> ByolError:
    """The error behind a failed call, as the server raised it where that is known.

    Anything that is not of our tree (an unexpected failure of the server) is a plain ByolError that
    begins with the status code.
    """
    found = {key: value for key, value in trailers if isinstance(value, str)}
    kind = getattr(errors, found.get(ERROR_KEY, ""), None) or _BY_CODE.get(code)
    if code is StatusCode.RESOURCE_EXHAUSTED and ERROR_KEY not in found:
        if "larger than max" in text:
            return InvalidRequest(f"{text}; send less in one request, or raise max_message_bytes")
        kind = Overloaded
    if not (isinstance(kind, type) and issubclass(kind, ByolError)):
        return ByolError(f"{code.name}: {text}")
    if issubclass(kind, InvalidImage):
        position = found.get(POSITION_KEY)
        if position is None:
            return kind(text)
        return kind(text.removeprefix(f"image {position}: "), int(position))
    if issubclass(kind, Overloaded):
        return kind(text, retry_after_s=int(found.get(RETRY_KEY, "100")) / 1000)
    return kind(text)
