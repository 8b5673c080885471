"""Access tokens: who may do what, and how often. A file holds only their hashes.

    [alice]
    sha256 = "9f86d0..."            # of the token, in hexadecimal
    scopes = ["read", "write"]      # of read, write and admin; none includes another
    rate = 100.0                    # requests a second, optional
    burst = 200                     # requests at once, optional; default: as many as in a second

`byol token` makes one. A token has 256 random bits, so a plain hash is enough: slow hashes are for
what people choose, which a dictionary finds.
"""

import hashlib
import hmac
import logging
import os
import re
import secrets
import threading
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from byol_serving.errors import InvalidConfig, Overloaded, Unauthenticated
from byol_serving.rates import Bucket, SharedBucket

log = logging.getLogger("byol.tokens")

Scope = Literal["read", "write", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
PREFIX = "byol_"
_GOOD_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")


@dataclass(frozen=True, kw_only=True)
class Token:
    """One entry of the file."""

    name: str
    sha256: str
    scopes: frozenset[Scope]
    rate: float | None = None
    """Requests a second."""
    burst: float | None = None
    """Requests at once; None: as many as in a second, and at least one."""


def new_token() -> tuple[str, str]:
    """A fresh token, to be shown once, and the hash to keep."""
    secret = PREFIX + secrets.token_urlsafe(32)
    return secret, _digest(secret)


def add_token(path: Path, token: Token) -> None:
    """Appends an entry; a new file is readable by its owner only.

    Raises:
        InvalidConfig: the file cannot be read as it is or has the name already, or it is no name.
    """
    if path.exists() and any(each.name == token.name for each in read_tokens(path)):
        raise InvalidConfig(f"{path} has a token {token.name!r} already; choose another name")
    if not _GOOD_NAME.fullmatch(token.name):
        raise InvalidConfig(f"token name {token.name!r}: use letters, digits, . _ @ and -")
    scopes = ", ".join(f'"{scope}"' for scope in sorted(token.scopes))
    lines = [f'["{token.name}"]', f'sha256 = "{token.sha256}"', f"scopes = [{scopes}]"]
    lines += [f"rate = {token.rate}"] if token.rate is not None else []
    lines += [f"burst = {token.burst}"] if token.burst is not None else []
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(handle, "a") as file:
        file.write("\n".join(lines) + "\n\n")


def read_tokens(path: Path) -> list[Token]:
    """All entries of a file.

    Raises:
        InvalidConfig: it cannot be read, or an entry is not as the module says.
    """
    try:
        entries = tomllib.loads(path.read_text())
    except OSError as error:
        raise InvalidConfig(f"tokens {path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidConfig(f"tokens {path} is not TOML: {error}") from error
    return [_parse(path, name, entry) for name, entry in entries.items()]


class Tokens:
    """The tokens of a file, read again when it changes. Thread-safe."""

    def __init__(self, path: Path, shared: Path | None = None) -> None:
        """Reads the file; raises as `read_tokens`.

        Args:
            path: of the file.
            shared: folder in which several processes of this machine count requests together;
                None: this process counts alone.
        """
        self._path, self._shared = path, shared
        self._lock = threading.Lock()
        self._buckets: dict[Token, Bucket | SharedBucket] = {}
        self._stamp = _stamp(path)
        self._tokens = read_tokens(path)
        self._checked = time.monotonic()

    def find(self, secret: str) -> Token:
        """Whose token it is.

        Raises:
            Unauthenticated: nobody's.
        """
        digest = _digest(secret)
        found: Token | None = None
        # All are compared, each in constant time: how long it takes tells nothing.
        for token in self._current():
            if hmac.compare_digest(token.sha256, digest):
                found = token
        if found is None:
            raise Unauthenticated("the token is not known here; ask for one, see byol token --help")
        return found

    def spend(self, token: Token) -> float:
        """Counts a request; seconds until there is room for it, 0 if there is (and it is spent)."""
        if token.rate is None:
            return 0.0
        with self._lock:
            if (bucket := self._buckets.get(token)) is None:
                bucket = self._buckets[token] = self._bucket(token, token.rate)
            return bucket.spend()

    def charge(self, token: Token) -> None:
        """Counts a request.

        Raises:
            Overloaded: over the token's rate; with a hint when there will be room.
        """
        if (wait := self.spend(token)) > 0:
            raise Overloaded(
                f"token {token.name!r} is over its rate of {token.rate:g} requests a second;"
                " send fewer, or more images in each",
                retry_after_s=wait,
            )

    def _bucket(self, token: Token, rate: float) -> Bucket | SharedBucket:
        size = max(1.0, rate if token.burst is None else token.burst)
        if self._shared is None:
            return Bucket(rate, size)
        return SharedBucket(rate, size, self._shared / _digest(token.name))

    def _current(self) -> list[Token]:
        now = time.monotonic()
        if now - self._checked < 1.0:
            return self._tokens
        with self._lock:
            self._checked = now
            if (stamp := _stamp(self._path)) != self._stamp:
                self._stamp = stamp
                try:
                    self._tokens = read_tokens(self._path)
                    log.info("read %d tokens from %s", len(self._tokens), self._path)
                except InvalidConfig as error:
                    log.error("the tokens are left as they were: %s", error)
            return self._tokens


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_mtime_ns, facts.st_size


def _parse(path: Path, name: str, entry: Any) -> Token:
    def refuse(what: str) -> InvalidConfig:
        return InvalidConfig(f"tokens {path}, entry {name!r}: {what}; make one with byol token")

    if not isinstance(entry, dict):
        raise refuse("is not a table")
    if unknown := entry.keys() - {"sha256", "scopes", "rate", "burst"}:
        raise refuse(f"has unknown keys {', '.join(sorted(unknown))}")
    digest, scopes = entry.get("sha256"), entry.get("scopes")
    if not isinstance(digest, str) or len(digest) != 64 or digest.strip("0123456789abcdef"):
        raise refuse("sha256 is not 64 hexadecimal digits in lower case")
    if not isinstance(scopes, list) or not scopes or not set(scopes) <= set(SCOPES):
        raise refuse(f"scopes {scopes!r} are not a list out of {', '.join(SCOPES)}")
    for key in ("rate", "burst"):
        value = entry.get(key)
        if value is not None and not (isinstance(value, int | float) and 0 < value < 1e9):
            raise refuse(f"{key} {value!r} is not a number over 0")
    return Token(
        name=name,
        sha256=digest,
        scopes=frozenset(cast(list[Scope], scopes)),
        rate=entry.get("rate"),
        burst=entry.get("burst"),
    )
