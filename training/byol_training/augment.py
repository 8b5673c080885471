"""The two view distributions, batched and on the device, drawn per image (paper, appendix B).

Two halves. `draw_view` draws every random number of a batch on the CPU, from a generator, in one
call: the same seed gives the same views on every device, and which images a step applies to is
known without asking the device. `apply_view` does the work:

- crop, resize and flip are two small matrices per image (one for rows, one for columns), so that
  the antialiased resize of torchvision becomes two batched matrix products;
- brightness, contrast and saturation are each a 3x3 colour matrix and an offset, so that every
  image can have its own order of the four at the price of one;
- hue turns in place without a full way to HSV and back;
- steps that only some images take are done on those images.

On a GPU the host only hands over numbers, a few for each image, and never waits: what goes there
goes from pinned memory, matrices are made there, and constants are there already.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from byol_training.config import AugmentConfig, ViewConfig
from byol_training.machine import send

_GREY = (0.2989, 0.587, 0.114)  # ITU-R 601-2 luma, as torchvision's rgb_to_grayscale
_TRIES = 10  # torchvision's RandomResizedCrop gives up after ten and takes the centre
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)


@dataclass(frozen=True, kw_only=True)
class ViewDraw:
    """What chance decided for a batch; everything on the CPU."""

    boxes: Tensor
    """float64 [B, 4]: top, left, height, width of the crop in pixels of the stored images; whole
    numbers where those have their pictures' shape."""
    flip: Tensor
    """bool [B]."""
    factors: Tensor
    """float64 [B, 4]: of brightness, contrast, saturation; turn of the hue."""
    order: Tensor
    """int64 [B, 4]: which of the four comes first, second, third, fourth; -1 where no jitter."""
    grey: Tensor
    """bool [B]."""
    blur: Tensor
    """bool [B]."""
    sigma: Tensor
    """float64 [B]."""
    solarise: Tensor
    """bool [B]."""

    def rows(self, part: slice) -> "ViewDraw":
        """The draw of some of the images."""
        return ViewDraw(**{name: value[part] for name, value in vars(self).items()})


def two_views(
    images: Tensor, config: AugmentConfig, size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A view from each distribution of every image.

    Args:
        images: uint8 [B, S, S, 3], on the device to work on.
        config: the distributions and the normalisation.
        size: side of the views.
        generator: on the CPU; the only source of chance.

    Returns:
        Two float32 [B, 3, size, size], normalised.
    """
    draws = draw_views(config, len(images), images.shape[1], generator)
    first, second = apply_views(images, config, draws, size)
    return first, second


def draw_views(
    config: AugmentConfig,
    count: int,
    side: int,
    generator: torch.Generator,
    *,
    views: int = 2,
    shapes: Tensor | None = None,
) -> list[ViewDraw]:
    """All chance for `views` views of each of `count` images, from T and T' in turn."""
    return [
        draw_view(_of_view(config, i), count, side, generator, shapes=shapes) for i in range(views)
    ]


def apply_views(
    images: Tensor, config: AugmentConfig, draws: list[ViewDraw], size: int
) -> list[Tensor]:
    """The views that `draws` decided on: float32 [B, 3, size, size] each, normalised."""
    views = [apply_view(images, _of_view(config, i), d, size) for i, d in enumerate(draws)]
    return [normalise(view, config) for view in views]


def _of_view(config: AugmentConfig, position: int) -> ViewConfig:
    return config.second if position % 2 else config.first


def normalise(images: Tensor, config: AugmentConfig) -> Tensor:
    """(x - mean) / std per channel: float [B, 3, H, W] in 0..1, changed in place."""
    mean, std = (_constant(each, images.device) for each in (config.mean, config.std))
    return images.sub_(mean.view(3, 1, 1)).div_(std.view(3, 1, 1))


@functools.cache
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 on the device, sent once: sending one waits for all that the device is doing."""
    return torch.tensor(values, device=device)


def draw_view(
    config: ViewConfig,
    count: int,
    side: int,
    generator: torch.Generator,
    *,
    shapes: Tensor | None = None,
) -> ViewDraw:
    """All chance for `count` images, from one call to the generator.

    Args:
        config: the distribution.
        count: how many images.
        side: of the stored squares, in pixels.
        generator: the only source of chance.
        shapes: int64 [count, 2], height and width of the pictures that were squashed into the
            squares: crops are drawn on the pictures, and lose nothing of them. None: squares.
    """
    u = torch.rand(count, 2 * _TRIES + 16, generator=generator, dtype=torch.float64)
    tries, u = u[:, : 2 * _TRIES], u[:, 2 * _TRIES :]
    strengths = (config.brightness, config.contrast, config.saturation, config.hue)
    strength = torch.tensor(strengths, dtype=torch.float64)
    factors = (2 * u[:, 4:8] - 1) * strength
    factors[:, :_HUE] += 1.0
    order = u[:, 8:12].argsort(dim=1)
    order[u[:, 3] >= config.jitter_p] = -1
    low, high = config.blur_sigma
    return ViewDraw(
        boxes=_draw_boxes(config, _sides(shapes, count, side), tries, u[:, :2])
        * _scale(shapes, side),
        flip=u[:, 2] < config.flip,
        factors=factors,
        order=order,
        grey=u[:, 12] < config.grey_p,
        blur=u[:, 13] < config.blur_p,
        sigma=low + (high - low) * u[:, 14],
        solarise=u[:, 15] < config.solarise_p,
    )


def _sides(shapes: Tensor | None, count: int, side: int) -> Tensor:
    """float64 [count, 2]: height and width of the pictures."""
    if shapes is None:
        return torch.full((count, 2), float(side), dtype=torch.float64)
    return shapes.double()


def _scale(shapes: Tensor | None, side: int) -> Tensor | float:
    """What boxes on the pictures are multiplied by to be boxes on the stored squares."""
    return 1.0 if shapes is None else side / shapes.double().repeat(1, 2)


def _draw_boxes(config: ViewConfig, sides: Tensor, tries: Tensor, place: Tensor) -> Tensor:
    """RandomResizedCrop of torchvision: the first of ten tries that fits, else the centre.

    Args:
        config: scale and ratio of the crops.
        sides: float64 [B, 2], height and width of the pictures.
        tries: float64 [B, 20], uniform.
        place: float64 [B, 2], uniform.

    Returns:
        float64 [B, 4]: top, left, height, width in whole pixels of the pictures.
    """
    scale_low, scale_high = config.crop_scale
    logs = [math.log(ratio) for ratio in config.crop_ratio]
    area = sides.prod(1, keepdim=True) * (scale_low + (scale_high - scale_low) * tries[:, :_TRIES])
    ratio = torch.exp(logs[0] + (logs[1] - logs[0]) * tries[:, _TRIES:])
    width, height = torch.sqrt(area * ratio).round(), torch.sqrt(area / ratio).round()
    high, wide = sides[:, :1], sides[:, 1:]
    fits = (width >= 1) & (width <= wide) & (height >= 1) & (height <= high)
    # A last column that always fits: the largest centred box of an allowed aspect.
    aspect = (wide / high).clamp(*config.crop_ratio)
    height = torch.cat([height, torch.minimum(high, (wide / aspect).round())], dim=1)
    width = torch.cat([width, torch.minimum(wide, (high * aspect).round())], dim=1)
    always = torch.ones(len(tries), 1, dtype=torch.bool)
    chosen = torch.cat([fits, always], dim=1).int().argmax(dim=1)
    size = torch.stack([t.gather(1, chosen[:, None])[:, 0] for t in (height, width)], dim=1)
    room = sides - size
    given_up = (chosen == _TRIES)[:, None]
    corner = torch.where(given_up, room / 2, place * (room + 1)).floor()
    return torch.cat([corner, size], dim=1)


def apply_view(images: Tensor, config: ViewConfig, draw: ViewDraw, size: int) -> Tensor:
    """The views that `draw` decided on.

    Args:
        images: uint8 [B, S, S, 3].
        config: of the draw; only the blur's kernel is read.
        draw: of the same B and S.
        size: side of the views.

    Returns:
        float32 [B, 3, size, size] in 0..1, a new tensor.
    """
    views = _crop(images, draw, size)
    _jitter(views, draw)
    _on(views, draw.grey, _to_grey)
    _blur(views, draw, config, size)
    _on(views, draw.solarise, _solarise)
    return views


def _crop(images: Tensor, draw: ViewDraw, size: int) -> Tensor:
    """Crop, antialiased bilinear resize and flip: rows · image · columns."""
    count, side = images.shape[:2]
    boxes, flip = send(draw.boxes.float(), images.device), send(draw.flip, images.device)
    rows = _resize_matrix(boxes[:, 0], boxes[:, 2], side, size)
    columns = _resize_matrix(boxes[:, 1], boxes[:, 3], side, size)
    columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    tall = torch.bmm(rows / 255, images.reshape(count, side, side * 3).float())
    tall = tall.view(count, size, side, 3).permute(0, 3, 1, 2).reshape(count, 3 * size, side)
    return torch.bmm(tall, columns.transpose(1, 2)).view(count, 3, size, size).clamp_(0.0, 1.0)


def _resize_matrix(start: Tensor, length: Tensor, side: int, size: int) -> Tensor:
    """float32 [B, size, side]: row i holds the weights of output pixel i; from float32 [B].

    A triangle around the output pixel's centre in the source, as wide as the scale where that
    shrinks (antialiasing), cut off at the crop's edge, summing to 1.
    """
    start, length = start[:, None, None], length[:, None, None]
    scale = length / size
    centre = start + (torch.arange(size, device=start.device)[None, :, None] + 0.5) * scale
    pixel = torch.arange(side, device=start.device)[None, None, :] + 0.5
    weights = (1.0 - (pixel - centre).abs() / scale.clamp(min=1.0)).clamp_(min=0.0)
    # Pixels that the crop has a part of: of a squashed picture, it may begin within one.
    weights *= (pixel + 0.5 > start) & (pixel - 0.5 < start + length)
    return weights / weights.sum(dim=2, keepdim=True)


def _jitter(views: Tensor, draw: ViewDraw) -> None:
    """Colour jitter in place, every image in its own order: four rounds, each with one of four."""
    factors = draw.factors.float()
    for place in range(4):
        kind = draw.order[:, place]
        _colour_matrices(views, kind, factors)
        turned = kind == _HUE
        turns = send(factors[turned, _HUE], views.device)
        if turns.numel() and bool((factors[:, _HUE] != 0).any()):
            _on(views, turned, partial(_turn_hue, turns=turns))


def _colour_matrices(views: Tensor, kind: Tensor, factors: Tensor) -> None:
    """Brightness, contrast or saturation, whichever `kind` says, in place.

    All three blend with something linear: out = f·x + (1-f)·(nothing | mean grey | grey of x).
    """
    grey = torch.tensor(_GREY)
    own = torch.ones(len(kind))
    for which in (_BRIGHTNESS, _CONTRAST, _SATURATION):
        own = torch.where(kind == which, factors[:, which], own)
    if bool((own == 1).all()):
        return
    rest = (1 - own)[:, None, None] * grey.expand(3, 3)
    matrix = own[:, None, None] * torch.eye(3) + rest * (kind == _SATURATION)[:, None, None]
    offset = rest * (kind == _CONTRAST)[:, None, None]
    matrix, offset = send(torch.stack([matrix, offset]), views.device).unbind()
    flat = views.flatten(2)
    offset = torch.bmm(offset, flat.mean(dim=2, keepdim=True))
    views.copy_(torch.baddbmm(offset, matrix, flat).clamp_(0.0, 1.0).view_as(views))


def _turn_hue(images: Tensor, turns: Tensor) -> Tensor:
    """HSV hue of float [B, 3, H, W] moved by `turns` [B], saturation and value kept.

    With chroma c = max - min, each channel is max - c·clamp(min(k, 4 - k), 0, 1), where
    k = (n + 6·hue) mod 6 and n is 5, 3, 1 for red, green, blue: no sextants, no gathers.
    """
    red, green, blue = images.unbind(1)
    value, low = images.amax(1), images.amin(1)
    chroma = value - low
    safe = chroma.clamp(min=1e-12)
    hue = torch.where(value == red, (green - blue) / safe, (red - green) / safe + 4.0)
    hue = torch.where((value == green) & (value != red), (blue - red) / safe + 2.0, hue)
    hue = hue + 6.0 * turns[:, None, None]
    shift = _constant((5.0, 3.0, 1.0), images.device).view(3, 1, 1)
    k = torch.remainder(hue[:, None] + shift, 6.0)
    part = torch.minimum(k, 4.0 - k).clamp_(0.0, 1.0)
    return value[:, None] - chroma[:, None] * part


def _solarise(images: Tensor) -> Tensor:
    return torch.where(images >= 0.5, 1.0 - images, images)


def _to_grey(images: Tensor) -> Tensor:
    weights = _constant(_GREY, images.device).view(3, 1, 1)
    return (images * weights).sum(dim=1, keepdim=True).expand_as(images)


def _blur(views: Tensor, draw: ViewDraw, config: ViewConfig, size: int) -> None:
    """Gaussian blur in place: the same banded matrix on rows and columns, mirrored at the edges."""
    reach = max(1, int(config.blur_kernel * size) // 2)
    sigma = send(draw.sigma[draw.blur].float(), views.device)
    matrices = _blur_matrix(sigma, min(reach, size - 1), size)

    def blur(some: Tensor) -> Tensor:
        across = some.reshape(len(some), 3 * size, size) @ matrices.transpose(1, 2)
        return matrices[:, None] @ across.view_as(some)

    _on(views, draw.blur, blur)


def _blur_matrix(sigma: Tensor, reach: int, size: int) -> Tensor:
    """float32 [B, size, size]: row i holds a Gaussian of 2·reach + 1 taps around pixel i."""
    device = sigma.device
    taps = torch.arange(-reach, reach + 1, device=device)
    kernel = torch.exp(-0.5 * (taps / sigma[:, None]) ** 2)
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    source = (
        torch.arange(size, device=device)[:, None] + taps
    )  # [size, taps], mirrored without the edge pixel:
    source = source.abs()
    source = torch.where(source >= size, 2 * (size - 1) - source, source)
    spread = torch.zeros(size, len(taps), size, device=device)
    spread.scatter_(2, source[:, :, None], 1.0)
    return torch.einsum("bt,its->bis", kernel, spread)


def _on(views: Tensor, which: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    """`change` applied in place to the images that `which` (bool [B], on the CPU) names."""
    if bool(which.all()):
        views.copy_(change(views))
    elif bool(which.any()):
        index = send(which.nonzero()[:, 0], views.device)
        views[index] = change(views[index])
