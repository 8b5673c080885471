"""Files that are whole or not there, whatever happens in between."""

import contextlib
from collections.abc import Callable
from pathlib import Path

from byol_serving.collections.disk import publish
from byol_serving.errors import StoreError


def write_durably(path: Path, write: Callable[[Path], None]) -> None:
    """Has `write` make a file under a temporary name, then renames it to `path`; fsyncs both.

    Raises:
        StoreError: the disk refused.
    """
    scratch = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(scratch)
        publish(scratch, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)  # on a full disk its bytes are wanted
        raise StoreError(
            f"{path} cannot be written ({error.strerror or error}); mend that and run again:"
            " finished shards are kept"
        ) from error
