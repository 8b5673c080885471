"""Everything a Python program usually asks a server for.

    python examples/python/client.py 127.0.0.1:50051 photo1.jpg photo2.jpg ...

A token and TLS files come from BYOL_TOKEN, BYOL_TLS_CA, BYOL_TLS_CERT and BYOL_TLS_KEY.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from byol_serving.client import Client, Retry
from byol_serving.errors import AlreadyExists, InvalidImage


def main() -> None:
    """Embeds, streams, extracts features, stores and searches."""
    address, *names = sys.argv[1:]
    files = [Path(name) for name in names]
    # A deadline for each call with all its tries; calls that are safe to repeat are tried again.
    with Client(address, timeout=30, retry=Retry(attempts=5)) as client:
        info = client.encoder()
        print(f"{info.model} {info.version}: {info.image_size} px to {info.dim} dimensions")

        vectors = client.embed(files)  # float32 [N, D], L2-normalised
        print("embedded", vectors.shape, vectors.dtype)
        print("cosine of the first two:", float(vectors[0] @ vectors[1]))

        small = client.embed(files, dtype="int8")  # a quarter of the bytes: 127 times the value
        print("as", small.dtype)

        # Any number of images over one call, read as the server takes them.
        done = 0
        for rows in client.embed_stream(repeated(files, 100)):
            done += len(rows)
        print("streamed", done)

        if info.stages:
            stage = info.stages[-1]
            maps = client.extract_features(files[:2], [stage.name], dtype="float16")
            print("feature map", stage.name, maps.maps[stage.name].shape, "stride", stage.stride)

        with contextlib.suppress(AlreadyExists):
            client.create_collection("example")
        client.upsert("example", names, images=files, metadata=[{"file": each} for each in names])
        for hit in client.search("example", image=files[0], k=min(3, len(files))):
            print(f"{hit.score:.3f} {hit.id} {dict(hit.metadata)}")

        try:
            client.embed([files[0], b"this is no image"])
        except InvalidImage as error:
            print("refused:", error)  # names the position in the list


def repeated(files: list[Path], count: int) -> Iterator[Path]:
    """As if there were more files than memory could hold."""
    for number in range(count):
        yield files[number % len(files)]


if __name__ == "__main__":
    main()
