"""Drives a server with the real tritonclient and prints what it saw as JSON.

A program of its own: tritonclient brings generated code of the same protobuf package, and one
process cannot hold both.

    python triton_client.py HOST:PORT MODEL PIXELS.npy
"""

import io
import json
import sys
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from PIL import Image
from tritonclient.utils import InferenceServerException


def png(pixels: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def infer(client: Any, model: str, name: str, values: Any, kind: str, **options: Any) -> Any:
    tensor = triton.InferInput(name, list(values.shape), kind)
    tensor.set_data_from_numpy(values)
    outputs = [triton.InferRequestedOutput("embedding")]
    answer = client.infer(model, [tensor], outputs=outputs, **options)
    return answer.get_response(as_json=True), answer.as_numpy("embedding").tolist()


def failure(client: Any, *arguments: Any, **options: Any) -> list[str]:
    try:
        infer(client, *arguments, **options)
    except InferenceServerException as error:
        return [error.status(), error.message()]
    return ["OK", ""]


def main() -> None:
    address, model, path = sys.argv[1:]
    pixels = np.load(path)
    client = triton.InferenceServerClient(address)
    files = np.array([png(each) for each in pixels], dtype=object)
    broken = np.array([png(pixels[0]), b"no image"], dtype=object)
    response, by_files = infer(client, model, "images", files, "BYTES", request_id="seven")
    _, by_pixels = infer(client, model, "pixels", pixels, "UINT8", client_timeout=20)
    seen = {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready(model),
        "other_ready": client.is_model_ready("other"),
        "server": client.get_server_metadata(as_json=True),
        "model": client.get_model_metadata(model, as_json=True),
        "config": client.get_model_config(model, as_json=True)["config"],
        "response": {key: response[key] for key in ("model_name", "model_version", "id")},
        "by_files": by_files,
        "by_pixels": by_pixels,
        "errors": {
            "model": failure(client, "other", "images", files, "BYTES"),
            "version": failure(client, model, "images", files, "BYTES", model_version="none"),
            "image": failure(client, model, "images", broken, "BYTES"),
            "input": failure(client, model, "other", files, "BYTES"),
            "shape": failure(client, model, "pixels", pixels[:, 1:], "UINT8"),
            "type": failure(client, model, "pixels", pixels.astype(np.float32), "FP32"),
        },
    }
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
