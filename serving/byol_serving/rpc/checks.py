"""What is wrong with a request is said before its images are decoded."""

from collections.abc import Sequence

from byol_serving.errors import EncoderMismatch, InvalidRequest
from byol_serving.pb.byol.v1 import byol_pb2 as pb


def check_claimed_encoder(name: str, encoder_id: str, claimed: str) -> None:
    """Holds what a caller says of his vectors against the encoder of a collection.

    Raises:
        EncoderMismatch: `claimed` is neither empty nor `encoder_id`.
    """
    if claimed and claimed != encoder_id:
        raise EncoderMismatch(
            f"collection {name!r} holds vectors of encoder {encoder_id[:12]}, not of"
            f" {claimed[:12]}; use another collection, or serve the encoder that made it"
        )


def check_lengths(request: pb.UpsertRequest) -> None:
    """Refuses an upsert whose parts do not belong together, before anything is decoded."""
    if not request.ids:
        raise InvalidRequest("the request has no ids; send one for each image or vector")
    if bool(request.images) == request.HasField("vectors"):
        raise InvalidRequest("send either images or vectors to upsert, and not both")
    rows: Sequence[tuple[str, int]] = [
        ("images", len(request.images)),
        ("metadata", len(request.metadata)),
    ]
    for name, count in rows:
        if count and count != len(request.ids):
            raise InvalidRequest(f"{len(request.ids)} ids but {count} {name}; send one for each id")
