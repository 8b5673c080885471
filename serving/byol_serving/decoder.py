"""Many image files to encoder inputs, one bad file at a time: the decode step of the pipeline."""

from collections.abc import Iterable, Sequence
from itertools import repeat

from byol_serving.errors import InvalidImage
from byol_serving.images import ImageLimits, Pixels, Preprocess, load_input
from byol_serving.jpeg_header import Jpeg


def decode_all(
    images: Sequence[bytes],
    how: Preprocess,
    limits: ImageLimits,
    headers: Iterable[Jpeg | None] = repeat(None),
) -> list[Pixels | InvalidImage]:
    """Decodes each image to uint8 [size, size, 3], or to the reason why it cannot be.

    Errors are returned and not raised, because the images of one call may come from several
    requests, and a bad one must fail its own request only. Blocks; the decoders release the GIL.

    Args:
        images: image files.
        how: what they are to become.
        limits: what is refused.
        headers: what `plain_jpeg` says of each, where it was asked before.
    """
    results: list[Pixels | InvalidImage] = []
    for data, header in zip(images, headers, strict=False):
        try:
            results.append(load_input(data, how, limits, header))
        except InvalidImage as error:
            results.append(error)
    return results
