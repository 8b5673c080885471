"""Triton (gRPC) through nvidia-pytriton, with our graph and decoder, for benchmarks/serve_load.py.

Encoded images go in as BYTES tensors, as Triton's clients send them. Two instances decode and embed
batches that Triton's dynamic batcher made.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import tritonclient.grpc as triton_grpc
from numpy.typing import NDArray
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig, TritonSecurityConfig
from tritonclient.grpc._utils import _get_inference_request

from byol_serving.images import Preprocess, load_input

MODEL = "embed"


def infer_function(model: str, size: int) -> Any:
    """What one instance runs."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model, options)
    how = Preprocess(size=size)

    @batch  # type: ignore[untyped-decorator]  # pytriton ships no types
    def infer(image: NDArray[np.object_]) -> dict[str, NDArray[np.float32]]:
        pixels = np.stack([load_input(each, how) for each in image[:, 0]])
        return {"embedding": session.run(["embedding"], {"images": pixels})[0]}

    return infer


def request_of(images: list[bytes]) -> bytes:
    """A serialised ModelInfer request."""
    tensor = triton_grpc.InferInput("image", [len(images), 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[image] for image in images], np.object_))
    request = _get_inference_request(
        model_name=MODEL,
        inputs=[tensor],
        model_version="",
        request_id="",
        outputs=None,
        sequence_id=0,
        sequence_start=False,
        sequence_end=False,
        priority=0,
        timeout=None,
        parameters=None,
    )
    serialised: bytes = request.SerializeToString()
    return serialised


def main() -> None:
    """Writes the request bodies, then serves."""
    setup: dict[str, Any] = json.loads(sys.argv[1])
    paths = sorted(Path(setup["images"]).iterdir())
    for folder, count in ((setup["bodies"], 1), (setup["lists"], setup["in_a_list"])):
        for at in range(0, len(paths) - count + 1, count):
            images = [path.read_bytes() for path in paths[at : at + count]]
            (Path(folder) / paths[at].name).write_bytes(request_of(images))
    # The shared-memory store between Triton and Python needs an RLock that the Python inside
    # Triton's stub lacks. Without it tensors travel as base64: cheap for small images, not for VGA.
    os.environ.setdefault("PYTRITON_NO_TENSORSTORE", "1")
    port = setup["port"]
    config = TritonConfig(
        http_port=port + 1, grpc_port=port, metrics_port=port + 2, grpc_address="127.0.0.1"
    )
    cores = len(os.sched_getaffinity(0))
    open_to_all = TritonSecurityConfig(restricted_endpoints=[])  # perf_analyzer reads its settings
    with Triton(config=config, security_config=open_to_all) as server:
        server.bind(
            model_name=MODEL,
            infer_func=[infer_function(setup["model"], setup["size"]) for _ in range(cores)],
            inputs=[Tensor(name="image", dtype=bytes, shape=(1,))],
            outputs=[Tensor(name="embedding", dtype=np.float32, shape=(-1,))],
            config=ModelConfig(
                max_batch_size=32, batcher=DynamicBatcher(max_queue_delay_microseconds=1000)
            ),
        )
        server.serve()


if __name__ == "__main__":
    main()
