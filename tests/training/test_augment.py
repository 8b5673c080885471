"""Views: each step against torchvision image by image, chance against its distribution."""

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from byol_training.augment import ViewDraw, apply_view, draw_view, normalise, two_views
from byol_training.config import AugmentConfig, ViewConfig

Floats = NDArray[np.float64]
PLAIN = ViewConfig(
    crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0, jitter_p=0.0, grey_p=0.0, blur_p=0.0
)


def pictures(count: int, side: int = 24) -> Tensor:
    """uint8 [count, side, side, 3]: smooth colours with an edge, so that every step shows."""
    generator = torch.Generator().manual_seed(5)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=side, mode="bicubic").clamp(0, 1)
    smooth[:, :, : side // 3] = 1 - smooth[:, :, : side // 3]
    return (smooth * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def draw(config: ViewConfig, count: int, side: int = 24, seed: int = 0) -> ViewDraw:
    return draw_view(config, count, side, torch.Generator().manual_seed(seed))


def as_float(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize("size", [24, 16, 40])
def test_crop_resize_and_flip_are_torchvisions(size: int) -> None:
    config = dataclasses.replace(PLAIN, crop_scale=(0.08, 1.0), crop_ratio=(0.75, 4 / 3), flip=0.5)
    images, chance = pictures(32), draw(config, 32)
    ours = apply_view(images, config, chance, size)
    assert 5 < int(chance.flip.sum()) < 27
    for i, image in enumerate(as_float(images)):
        top, left, height, width = (int(v) for v in chance.boxes[i])
        theirs = TF.resized_crop(image, top, left, height, width, [size, size], antialias=True)
        if chance.flip[i]:
            theirs = TF.horizontal_flip(theirs)
        torch.testing.assert_close(ours[i], theirs, atol=2e-5, rtol=0)


def test_jitter_is_torchvisions_in_each_images_own_order() -> None:
    config = dataclasses.replace(PLAIN, jitter_p=0.8, hue=0.5)
    images, chance = pictures(64), draw(config, 64)
    ours = apply_view(images, config, chance, 24)
    steps = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    for i, image in enumerate(as_float(images)):
        for kind in chance.order[i].tolist():
            if kind >= 0:
                image = steps[kind](image, float(chance.factors[i, kind]))
        torch.testing.assert_close(ours[i], image, atol=5e-4, rtol=0)


def test_jitter_draws_every_order_and_factor_evenly() -> None:
    config = ViewConfig(brightness=0.4, hue=0.1)
    chance = draw(config, 20_000)
    jittered = chance.order[:, 0] >= 0
    assert float(jittered.double().mean()) == pytest.approx(0.8, abs=0.012)
    counts = Counter(tuple(order) for order in chance.order[jittered].tolist())
    assert len(counts) == 24
    assert min(counts.values()) > 0.8 * int(jittered.sum()) / 24
    for column, (low, high) in enumerate([(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]):
        values = chance.factors[:, column].numpy()
        assert ks(values, np.linspace(low, high, 20_000)) < 0.02


def test_boxes_are_distributed_as_torchvisions() -> None:
    side, count = 96, 3000
    config = ViewConfig()
    torch.manual_seed(0)
    get = v2.RandomResizedCrop(side, scale=config.crop_scale, ratio=config.crop_ratio)
    image = torch.zeros(3, side, side)
    theirs = [get.make_params([image]) for _ in range(count)]
    reference = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in theirs], float)
    ours = draw(config, count, side).boxes.numpy()

    def measures(boxes: Floats) -> list[Floats]:
        top, left, height, width = boxes.T
        return [height * width, np.log(width / height), top + height / 2, left + width / 2]

    for one, other in zip(measures(ours), measures(reference), strict=True):
        assert ks(one, other) < 0.05  # two samples of 3000: by chance, once in a thousand


def test_boxes_on_squashed_pictures_are_those_of_the_pictures() -> None:
    """A 180 x 90 picture in a 60 x 60 square: torchvision's crops of the picture, nothing lost."""
    count, config = 3000, ViewConfig()
    torch.manual_seed(0)
    get = v2.RandomResizedCrop(32, scale=config.crop_scale, ratio=config.crop_ratio)
    image = torch.zeros(3, 90, 180)
    theirs = [get.make_params([image]) for _ in range(count)]
    reference = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in theirs], float)
    shapes = torch.tensor([[90, 180]]).expand(count, 2)
    generator = torch.Generator().manual_seed(0)
    stored = draw_view(config, count, 60, generator, shapes=shapes).boxes.numpy()
    ours = stored * np.array([1.5, 3.0, 1.5, 3.0])
    assert np.allclose(ours, ours.round(), atol=1e-9)
    ours = ours.round()
    for column in range(4):
        assert ks(ours[:, column], reference[:, column]) < 0.05
    assert ks(np.log(ours[:, 3] / ours[:, 2]), np.log(reference[:, 3] / reference[:, 2])) < 0.05


def test_crops_of_squashed_pictures_are_crops_of_the_pictures() -> None:
    config = dataclasses.replace(PLAIN, crop_scale=(0.2, 1.0), crop_ratio=(0.75, 4 / 3))
    wide = torch.nn.functional.interpolate(as_float(pictures(8, 48)), size=(48, 96), mode="bicubic")
    wide = wide.clamp(0, 1)
    square = TF.resize(wide, [48, 48], antialias=True)
    stored = (square * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    shapes = torch.tensor([[48, 96]]).expand(8, 2)
    chance = draw_view(config, 8, 48, torch.Generator().manual_seed(0), shapes=shapes)
    ours = apply_view(stored, config, chance, 24)
    for i, image in enumerate(wide):
        top, left, height, width = (chance.boxes[i] * torch.tensor([1, 2, 1, 2])).round().int()
        theirs = TF.resized_crop(image, int(top), int(left), int(height), int(width), [24, 24])
        assert float((ours[i] - theirs).abs().mean()) < 0.02  # they were resized twice


@pytest.mark.parametrize("ratio", [(3.0, 4.0), (0.2, 0.3)])
def test_a_box_that_never_fits_is_the_centre(ratio: tuple[float, float]) -> None:
    config = ViewConfig(crop_scale=(1.0, 1.0), crop_ratio=ratio)
    get = v2.RandomResizedCrop(8, scale=config.crop_scale, ratio=config.crop_ratio)
    theirs = get.make_params([torch.zeros(3, 60, 60)])
    top, left, height, width = draw(config, 3, 60).boxes[1].tolist()
    assert (height, width) == (theirs["height"], theirs["width"])
    assert abs(top - theirs["top"]) <= 1
    assert abs(left - theirs["left"]) <= 1


def test_grey_blur_and_solarise_are_torchvisions() -> None:
    images = pictures(24)
    for changes in ({"grey_p": 0.5}, {"blur_p": 0.5, "blur_kernel": 0.3}, {"solarise_p": 0.5}):
        config = dataclasses.replace(PLAIN, **changes)  # type: ignore[arg-type]  # floats, all
        chance = draw(config, 24)
        ours = apply_view(images, config, chance, 24)
        for i, image in enumerate(as_float(images)):
            expected = image
            if chance.grey[i]:
                expected = TF.rgb_to_grayscale(expected, 3)
            if chance.blur[i]:
                expected = TF.gaussian_blur(expected, [7, 7], [float(chance.sigma[i])] * 2)
            if chance.solarise[i]:
                expected = TF.solarize(expected, 0.5)
            torch.testing.assert_close(ours[i], expected, atol=1e-5, rtol=0)


def test_the_papers_kernel_is_23_of_224() -> None:
    config = dataclasses.replace(PLAIN, blur_p=1.0, blur_sigma=(100.0, 100.0))
    image = torch.zeros(1, 224, 224, 3, dtype=torch.uint8)
    image[0, 112, 112] = 255
    view = apply_view(image, config, draw(config, 1, 224), 224)
    assert int((view[0, 0, 112] > 1e-6).sum()) == 23


def test_pixel_statistics_are_torchvisions() -> None:
    """Both pipelines over the same pictures: mean and spread of pixels agree per channel."""
    torch.manual_seed(0)
    config = ViewConfig(solarise_p=0.2)
    theirs = v2.Compose(
        [
            v2.RandomResizedCrop(24, scale=(0.08, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.GaussianBlur(3, (0.1, 2.0)),
            v2.RandomSolarize(0.5, p=0.2),
        ]
    )
    count = 600
    images = pictures(1).expand(count, -1, -1, -1)
    ours = apply_view(images, config, draw(config, count), 24)
    reference = torch.stack([theirs(image) for image in as_float(images)])
    for a, b in (
        (ours.mean((2, 3)), reference.mean((2, 3))),
        (ours.std((2, 3)), reference.std((2, 3))),
    ):
        tolerance = 4 * (a.var(0) / count + b.var(0) / count).sqrt()  # four standard errors
        assert ((a.mean(0) - b.mean(0)).abs() < tolerance).all()


def test_probabilities_and_sigmas_are_the_configurations() -> None:
    config = ViewConfig(flip=0.3, grey_p=0.2, blur_p=0.6, solarise_p=0.1, blur_sigma=(0.1, 2.0))
    count = 20_000
    chance = draw(config, count)
    for drawn, wanted in (
        (chance.flip, 0.3),
        (chance.grey, 0.2),
        (chance.blur, 0.6),
        (chance.solarise, 0.1),
    ):
        error = 4 * (wanted * (1 - wanted) / count) ** 0.5  # four standard errors
        assert float(drawn.double().mean()) == pytest.approx(wanted, abs=error)
    assert ks(chance.sigma.numpy(), np.linspace(0.1, 2.0, count)) < 0.02
    pairs = torch.stack([chance.flip, chance.grey, chance.blur, chance.solarise]).double()
    correlation = torch.corrcoef(pairs) - torch.eye(4)
    assert float(correlation.abs().max()) < 0.03  # independent of each other


def test_same_seed_same_views_and_every_image_its_own() -> None:
    config, images = AugmentConfig(), pictures(1).expand(8, -1, -1, -1)
    runs = [two_views(images, config, 16, torch.Generator().manual_seed(7)) for _ in range(2)]
    for again, before in zip(*runs, strict=True):
        assert torch.equal(again, before)
    first, second = runs[0]
    assert first.shape == second.shape == (8, 3, 16, 16)
    assert not torch.equal(first, second)
    assert len({tuple(v.flatten().tolist()) for v in first}) == 8


def test_normalisation() -> None:
    config = AugmentConfig(mean=(0.5, 0.0, 0.25), std=(0.5, 1.0, 0.25))
    white = normalise(torch.ones(1, 3, 2, 2), config)
    assert white[0, :, 0, 0].tolist() == pytest.approx([1.0, 1.0, 3.0])


def test_grey_images_stay_grey() -> None:
    """Hue and saturation leave equal channels equal: no colour is made from rounding."""
    grey = pictures(16).float().mean(3, keepdim=True).to(torch.uint8).expand(-1, -1, -1, 3)
    views = apply_view(grey, ViewConfig(jitter_p=1.0), draw(ViewConfig(jitter_p=1.0), 16), 24)
    assert float((views.amax(1) - views.amin(1)).max()) < 1e-5
    assert math.isfinite(float(views.sum()))


def ks(one: Floats, other: Floats) -> float:
    """Kolmogorov-Smirnov distance of two samples."""
    every = np.concatenate([one, other])
    cdfs = [np.searchsorted(np.sort(s), every, side="right") / len(s) for s in (one, other)]
    return float(np.abs(cdfs[0] - cdfs[1]).max())
