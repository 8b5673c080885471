"""An encoder bundle in ONNX Runtime: pixels in, embeddings out, on CUDA or CPU."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from byol_serving.bundle import GOLDEN_TOLERANCE, Bundle, cosine_distance
from byol_serving.errors import InvalidBundle, InvalidConfig, InvalidRequest
from byol_serving.images import Pixels

Device = Literal["auto", "cpu", "cuda"]


class Encoder:
    """One ONNX Runtime session. `embed` is thread-safe and blocking."""

    def __init__(self, bundle: Bundle, *, device: Device = "auto", threads: int = 0) -> None:
        """Loads the graph.

        Args:
            bundle: whose encoder to load.
            device: auto takes CUDA where ONNX Runtime offers it and a device is there, else CPU.
            threads: intra-op threads on the CPU; 0: one per core.

        Raises:
            InvalidConfig: `cuda` asked for and not to be had (never a silent fall back).
            InvalidBundle: ONNX Runtime cannot load the graph, or it is not an encoder.
        """
        self.bundle = bundle
        self._session = _open_session(bundle, device, threads)
        self.provider: str = self._session.get_providers()[0]
        if device == "cuda" and self.provider != "CUDAExecutionProvider":
            raise InvalidConfig(
                f"device cuda was asked for, but ONNX Runtime fell back to {self.provider};"
                " run byol doctor to see what is missing, or use device=cpu"
            )
        names = [node.name for node in self._session.get_inputs()]
        if names != ["images"] or self._session.get_outputs()[0].name != "embedding":
            raise InvalidBundle(
                f"{bundle.model_path} is not an encoder: its inputs are {names}, wanted ['images']"
            )
        offered = {node.name for node in self._session.get_outputs()}
        if missing := {each.name for each in bundle.info.features} - offered:
            raise InvalidBundle(
                f"{bundle.model_path} lacks the feature maps {', '.join(sorted(missing))} that its"
                " bundle.json names; export the bundle again"
            )

    @property
    def dim(self) -> int:
        """Dimension D of the embedding."""
        return self.bundle.info.dim

    @property
    def image_size(self) -> int:
        """Height and width S of the input."""
        return self.bundle.info.preprocess.size

    def embed(self, pixels: Pixels) -> NDArray[np.float32]:
        """Embeds uint8 [N, S, S, 3] as L2-normalised float32 [N, D].

        Raises:
            InvalidRequest: another shape or dtype.
        """
        self._check(pixels)
        if len(pixels) == 0:
            return np.empty((0, self.dim), np.float32)
        (embedding,) = self._session.run(["embedding"], {"images": pixels})
        return np.asarray(embedding, np.float32)

    def extract(self, pixels: Pixels, outputs: Sequence[str]) -> list[NDArray[np.float32]]:
        """Any outputs of the graph: `embedding` [N, D], or feature maps [N, C, H, W] by name.

        ONNX Runtime runs the whole graph once, whichever outputs are asked for; the others cost no
        more than that and are not copied out.

        Args:
            pixels: uint8 [N, S, S, 3], at least one.
            outputs: names that the bundle offers, in the order of the answer.

        Raises:
            InvalidRequest: another shape or dtype.
        """
        self._check(pixels)
        return list(self._session.run(list(outputs), {"images": pixels}))

    def _check(self, pixels: Pixels) -> None:
        size = self.image_size
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != (size, size, 3):
            raise InvalidRequest(
                f"pixels are {pixels.dtype} {list(pixels.shape)},"
                f" wanted uint8 [N, {size}, {size}, 3]"
            )

    def check_golden(self) -> float:
        """Replays the golden pairs; returns the largest cosine distance to PyTorch's embedding.

        Raises:
            InvalidBundle: past the tolerance of the bundle's precision.
        """
        images, wanted = self.bundle.golden()
        worst = float(cosine_distance(self.embed(images), wanted).max())
        limit = GOLDEN_TOLERANCE[self.bundle.info.precision]
        if not worst <= limit:  # NaN fails too
            raise InvalidBundle(
                f"{self.bundle.path} fails its golden check: cosine distance {worst:.2e} is over"
                f" {limit:.0e} on {self.provider}; export the bundle again"
            )
        return worst


def _open_session(bundle: Bundle, device: Device, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Spinning brings nothing under load and doubles the CPU time when idle.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    cuda = "CUDAExecutionProvider" in ort.get_available_providers() and device != "cpu"
    if device == "cuda" and not cuda:
        raise InvalidConfig(
            "device cuda was asked for, but this ONNX Runtime has no CUDA provider;"
            " install byol-server[gpu], or use device=cpu"
        )
    providers: list[str | tuple[str, dict[str, str]]] = ["CPUExecutionProvider"]
    if cuda:
        # HEURISTIC: under EXHAUSTIVE every new batch size stalls for hundreds of milliseconds.
        providers.insert(0, ("CUDAExecutionProvider", {"cudnn_conv_algo_search": "HEURISTIC"}))
    try:
        return ort.InferenceSession(bundle.model_path, options, providers=providers)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InvalidBundle(f"ONNX Runtime cannot load {bundle.model_path}: {reason}") from error
