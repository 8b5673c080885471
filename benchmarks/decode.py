"""Decoding to the encoder's input: ours, Pillow's full decode, and Pillow's draft mode.

VGA photographs to 224 pixels, and 12-megapixel ones, one thread.
"""

import io
import time
from collections.abc import Callable

import numpy as np
from load_material import photographs
from PIL import Image, ImageOps, _imaging

from byol_serving.images import ImageLimits, Pixels, Preprocess, load_input
from harness import Rate, interleaved, options, report

SIZE = 224
HOW = Preprocess(size=SIZE)


def main() -> None:
    """Measures and prints."""
    chosen = options(__doc__ or "")
    vga = photographs(8 if chosen.quick else 64)
    large = [enlarged(data) for data in vga[: 1 if chosen.quick else 4]]
    results: dict[str, Rate] = {}
    for name, files in (("VGA", vga), ("12 MP", large)):
        candidates = {
            f"{name} ours": rate(files, lambda data: load_input(data, HOW, ImageLimits())),
            f"{name} Pillow": rate(files, plain_pillow(with_pillow)),
            f"{name} Pillow draft": rate(files, plain_pillow(with_draft)),
        }
        results |= interleaved(candidates, unit="images/s", repeats=3 if chosen.quick else 7)
    ratios = {
        "decode_vs_pillow": results["VGA ours"].median / results["VGA Pillow"].median,
        "decode_vs_draft": results["VGA ours"].median / results["VGA Pillow draft"].median,
        "large_vs_pillow": results["12 MP ours"].median / results["12 MP Pillow"].median,
    }
    differences = [difference(data) for data in vga]
    facts = {
        "to": f"{SIZE} pixels",
        "mean difference to Pillow": f"{np.mean(differences):.2f} of 255",
    }
    report("decode", chosen, results, ratios, packages=["pillow", "simplejpeg"], facts=facts)


def rate(files: list[bytes], decode: Callable[[bytes], Pixels]) -> Callable[[], float]:
    """Images a second of one thread, over all files once."""

    def measure() -> float:
        began = time.perf_counter()
        for data in files:
            decode(data)
        return len(files) / (time.perf_counter() - began)

    return measure


def vga_against_pillow(files: list[bytes]) -> float:
    """The ratio that benchmarks/serve_load.py reports beside its own."""
    ours = rate(files, lambda data: load_input(data, HOW))
    pillow = rate(files, plain_pillow(with_pillow))
    pairs = [(ours(), pillow()) for _ in range(4)][1:]
    return float(np.median([ours / theirs for ours, theirs in pairs]))


def plain_pillow(decode: Callable[[bytes], Pixels]) -> Callable[[bytes], Pixels]:
    """Pillow as it comes: our decoder makes it keep its buffers, which a plain server does not."""

    def run(data: bytes) -> Pixels:
        kept = _imaging.get_blocks_max()
        _imaging.set_blocks_max(0)
        try:
            return decode(data)
        finally:
            _imaging.set_blocks_max(kept)

    return run


def with_pillow(data: bytes, *, draft: bool = False) -> Pixels:
    """As a server without our decoder does it: full decode, upright, one resize from the centre."""
    with Image.open(io.BytesIO(data)) as image:
        if draft:
            image.draft("RGB", (SIZE, SIZE))
        upright = ImageOps.exif_transpose(image).convert("RGB")
    side = min(upright.size)
    left, top = (upright.width - side) / 2, (upright.height - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(upright.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box))


def with_draft(data: bytes) -> Pixels:
    """With libjpeg's scaling, which Pillow calls draft mode."""
    return with_pillow(data, draft=True)


def difference(data: bytes) -> float:
    """Mean absolute difference of the pixels, of 255."""
    return float(np.abs(load_input(data, HOW).astype(int) - with_pillow(data).astype(int)).mean())


def enlarged(data: bytes) -> bytes:
    """The photograph at 12 megapixels."""
    with Image.open(io.BytesIO(data)) as image:
        buffer = io.BytesIO()
        image.resize((4000, 3000), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
