"""What may enter a collection: ids, vectors, metadata, names."""

import json
import re
from collections.abc import Sequence
from typing import cast, get_args

import numpy as np

from byol_serving.collections.types import IdType, IndexKind, Metadata, Vectors
from byol_serving.collections.units import unit_rows
from byol_serving.errors import InvalidRequest, InvalidVector

MAX_ID_BYTES = 512
MAX_METADATA_BYTES = 1 << 20
MAX_DIM = 65_536

_KINDS = get_args(IndexKind)
_ID_TYPES = get_args(IdType)
# One text for each integer, so that two texts are never the same id: no zeros before, no "-0".
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,18}")
_INT64 = range(-(2**63), 2**63)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
# An escaped NUL; an even run of backslashes before it is text that only looks like one.
_ESCAPED_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


def collection_name(name: str, what: str = "collection") -> str:
    """Raises InvalidRequest for a name that is not a plain folder name."""
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"{what} name {name[:80]!r} is not allowed: use 1 to 64 letters, digits, '_', '.' "
            "or '-', beginning with a letter or digit"
        )
    return name


def dimension(dim: int) -> int:
    """Raises InvalidRequest for a dimension below 1 or above MAX_DIM."""
    if not 1 <= dim <= MAX_DIM:
        raise InvalidRequest(f"dimension {dim} is outside 1 to {MAX_DIM}: give the encoder's")
    return dim


def index_kind(kind: str) -> IndexKind:
    """Raises InvalidRequest for an index kind that there is not."""
    if kind not in _KINDS:
        raise InvalidRequest(f"index kind {kind[:40]!r} is unknown: use {', '.join(_KINDS)}")
    return cast(IndexKind, kind)


def id_type(name: str) -> IdType:
    """Raises InvalidRequest for a type of ids that there is not."""
    if name not in _ID_TYPES:
        raise InvalidRequest(f"id type {name[:40]!r} is unknown: use {' or '.join(_ID_TYPES)}")
    return cast(IdType, name)


def could_be_id(text: str) -> bool:
    """Whether an item could have this id; False for text that cannot even be looked up."""
    return text.isprintable() or not any(c == "\x00" or "\ud800" <= c <= "\udfff" for c in text)


def item_ids(ids: Sequence[str], kind: IdType = "string") -> list[str]:
    """The ids as a list.

    Raises:
        InvalidRequest: one is empty, too long, not text, not of the kind, or repeated.
    """
    seen: set[str] = set()
    for position, each in enumerate(ids):
        if not each or "\x00" in each:
            raise InvalidRequest(
                f"id {position} is {'empty' if not each else 'holding a NUL character'}: "
                "give plain text of 1 to 512 bytes"
            )
        try:
            size = len(each) if each.isascii() else len(each.encode())
        except UnicodeEncodeError:
            raise InvalidRequest(f"id {position} is not valid Unicode: send UTF-8") from None
        if size > MAX_ID_BYTES:
            raise InvalidRequest(
                f"id {position} ({each[:20]!r}...) has {size} bytes, at most {MAX_ID_BYTES}: "
                "shorten it, and keep the rest in metadata"
            )
        if kind == "int64" and not (_INTEGER.fullmatch(each) and int(each) in _INT64):
            raise InvalidRequest(
                f"id {position} ({each[:24]!r}) is no 64-bit integer in plain digits, as this"
                " collection's ids are: send such, or create one with string ids"
            )
        if each in seen:
            raise InvalidRequest(f"id {each[:80]!r} is twice in the batch: send each id once")
        seen.add(each)
    return list(ids)


def unit_vectors(vectors: Vectors, dim: int) -> Vectors:
    """Float32 [N, dim], C-contiguous, each of length 1.

    Raises:
        InvalidVector: not [N, dim], not finite, or zero; names the first such row.
    """
    given = np.asarray(vectors)
    if given.ndim != 2 or given.shape[1] != dim or given.dtype.kind not in "fiu":
        raise InvalidVector(
            f"vectors are {given.dtype} of shape {list(given.shape)}, the collection takes "
            f"float32 [N, {dim}]: send vectors of the collection's encoder"
        )
    kind = given.dtype  # what is compiled takes neither another byte order nor odd addresses
    plain = kind.char in "fd" and kind.isnative and given.flags.aligned
    floats = given if plain else given.astype(np.float64)
    units, row = unit_rows(floats)
    if row >= 0:
        fault = "zero" if np.abs(floats[row]).max() < 1 else "not finite"
        raise InvalidVector(
            f"vector {row} is {fault}: send finite, non-zero vectors (cosine needs a direction)"
        )
    return units


def metadata_text(metadata: Metadata, position: int) -> str:
    """The metadata as JSON text, as it is stored.

    Raises:
        InvalidRequest: not an object of JSON values, NaN or infinite, an integer outside 64 bits,
            a NUL character, or over MAX_METADATA_BYTES.
    """
    for key, value in metadata.items():
        if not isinstance(key, str):
            raise InvalidRequest(f"metadata {position} has the key {key!r}: keys are strings")
        if type(value) is int and not -(2**63) <= value < 2**63:
            raise InvalidRequest(
                f"metadata {position} has {key!r} = an integer outside 64 bits: send it as a string"
            )
    try:
        text = _dumps(dict(metadata))
        size = len(text) if text.isascii() else len(text.encode())
    except (TypeError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0][:120]
        raise InvalidRequest(
            f"metadata {position} is not JSON ({reason}): send null, booleans, finite numbers, "
            "strings, lists and objects"
        ) from None
    if "\\u0000" in text and _ESCAPED_NUL.search(text):
        # SQLite's JSON functions cut a string at NUL, so filters on it could not be exact.
        raise InvalidRequest(f"metadata {position} holds a NUL character: remove it")
    if size > MAX_METADATA_BYTES:
        raise InvalidRequest(
            f"metadata {position} has {size} bytes, at most {MAX_METADATA_BYTES}: "
            "keep large payloads elsewhere and store their address"
        )
    return text


_dumps = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def same_length(ids: Sequence[str], others: int, what: str) -> None:
    """Raises InvalidRequest where a batch's parts differ in length."""
    if len(ids) != others:
        raise InvalidRequest(f"{len(ids)} ids but {others} {what}: send one for each id")


def k_of(k: int, count: int) -> int:
    """Raises InvalidRequest for a k that the collection cannot answer."""
    if count == 0:
        raise InvalidRequest("the collection is empty: upsert vectors before searching")
    if k < 1 or k > count:
        raise InvalidRequest(f"k = {k} is outside 1 to {count}, the collection's size: lower k")
    return k


def effort(effort: int | None) -> None:
    """Raises InvalidRequest for a search effort below 1."""
    if effort is not None and effort < 1:
        raise InvalidRequest(f"effort {effort} is below 1: leave it out for the tuned one")
