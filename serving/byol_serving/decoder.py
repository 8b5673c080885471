"""Many image files to encoder inputs, one bad file at a time: the decode step of the pipeline."""

from collections.abc import Sequence

from byol_serving.errors import InvalidImage
from byol_serving.images import ImageLimits, Pixels, Preprocess, load_input


def decode_all(
    images: Sequence[bytes], how: Preprocess, limits: ImageLimits
) -> list[Pixels | InvalidImage]:
    """Decodes each image to uint8 [size, size, 3], or to the reason why it cannot be.

    Errors are returned and not raised, because the images of one call may come from several
    requests, and a bad one must fail its own request only. Blocks; the decoders release the GIL.
    """
    results: list[Pixels | InvalidImage] = []
    for data in images:
        try:
            results.append(load_input(data, how, limits))
        except InvalidImage as error:
            results.append(error)
    return results
