"""A LitServe server (HTTP) with our graph and our decoder, for benchmarks/serve_load.py.

As LitServe's documentation says to serve images: a multipart upload, requests batched for a few
milliseconds, one worker process for each core.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import litserve
import numpy as np
import onnxruntime as ort
from fastapi import Request, Response
from numpy.typing import NDArray

from byol_serving.images import Pixels, Preprocess, load_input


class Embed(litserve.LitAPI):  # type: ignore[misc]  # LitServe ships no types
    """Bytes to pixels to a vector."""

    def __init__(self, model: str, size: int) -> None:
        super().__init__(max_batch_size=32, batch_timeout=0.005)
        self._model, self._how = model, Preprocess(size=size)

    def setup(self, device: str) -> None:
        """In each worker."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = ort.InferenceSession(self._model, options)

    def decode_request(self, request: Request) -> Pixels:
        """One image."""
        return load_input(request["image"].file.read(), self._how)  # a form

    def batch(self, inputs: list[Pixels]) -> Pixels:
        """What was decoded, as one array."""
        return np.stack(inputs)

    def predict(self, pixels: Pixels) -> NDArray[np.float32]:
        """The encoder; a single image comes without the batch dimension."""
        rows: NDArray[np.float32] = self._session.run(["embedding"], {"images": pixels})[0]
        return rows

    def unbatch(self, output: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """Row by row."""
        return list(output)

    def encode_response(self, output: NDArray[np.float32]) -> Response:
        """The vector's bytes."""
        return Response(output.tobytes(), media_type="application/octet-stream")


def main() -> None:
    """Writes the request bodies, then serves."""
    setup: dict[str, Any] = json.loads(sys.argv[1])
    edge = setup["edge"]
    for path in Path(setup["images"]).iterdir():
        head = (
            f'--{edge}\r\nContent-Disposition: form-data; name="image"; filename="i.jpg"\r\n'
            "Content-Type: image/jpeg\r\n\r\n"
        )
        body = head.encode() + path.read_bytes() + f"\r\n--{edge}--\r\n".encode()
        (Path(setup["bodies"]) / path.name).write_bytes(body)
    api = Embed(setup["model"], setup["size"])
    server = litserve.LitServer(
        api, accelerator="cpu", workers_per_device=len(os.sched_getaffinity(0)), timeout=60
    )
    server.run(host="127.0.0.1", port=setup["port"], log_level="error", generate_client_file=False)


if __name__ == "__main__":
    main()
