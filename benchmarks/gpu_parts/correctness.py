"""Item 1: the device gives what the processor gives."""

from typing import Any

import numpy as np
import torch
from gpu_parts.rows import Asked, Row, at_least, at_most
from load_material import photographs, pixels_of, untrained_resnet
from torch import Tensor

from byol_serving.bundle import GOLDEN_TOLERANCE, cosine_distance
from byol_serving.encoder import Encoder
from byol_training.augment import two_views
from byol_training.byol import Byol
from byol_training.config import AugmentConfig, Compile, OptimizerConfig, TrainConfig
from byol_training.data import images_from_arrays
from byol_training.export import Precision
from byol_training.feed import Feed
from byol_training.lars import build_optimizer
from byol_training.machine import Machine, choose_machine, compile_networks
from byol_training.pretrain import build_model, gradients
from byol_training.recipes import small_config


def onnx_embeddings(asked: Asked) -> list[Row]:
    """ONNX Runtime on the device against PyTorch on the processor, on real photographs."""
    pixels = pixels_of(photographs(8), 224)
    rows = []
    precisions: tuple[Precision, ...] = ("fp32", "fp16")
    for precision in precisions:
        bundle = untrained_resnet(asked.scratch / f"onnx-{precision}", pixels, precision)
        encoder = Encoder(bundle, device="cuda" if asked.on_gpu else "cpu")
        images, wanted = bundle.golden()
        worst = float(cosine_distance(encoder.embed(images), wanted).max())
        what = f"ONNX Runtime {precision} against golden, cosine distance"
        rows.append(at_most(what, worst, GOLDEN_TOLERANCE[precision], note=encoder.provider))
    return rows


def faiss_neighbours(asked: Asked) -> list[Row]:
    """The ten neighbours that FAISS finds: the part that both sides name, of 256 queries."""
    from gpu_parts.neighbours import FLAT, IVF, build, to_device

    from search_data import clustered

    data = clustered(5_000 if asked.quick else 200_000, 256)
    rows = []
    for kind in (FLAT, IVF):
        index = build(kind, data.vectors)
        _, wanted = index.search(data.queries, 10)
        _, found = to_device(index, asked).search(data.queries, 10)
        same = [len(np.intersect1d(*pair)) / 10 for pair in zip(wanted, found, strict=True)]
        what = f"FAISS {kind}, CPU and {asked.other}, same neighbours"
        rows.append(at_least(what, float(np.mean(same)), 0.99))
    return rows


def augmentation(asked: Asked) -> list[Row]:
    """Views of the same draws, in standard deviations of a pixel."""
    side, size = (40, 32) if asked.quick else (256, 224)
    pixels = np.random.default_rng(0).integers(0, 256, (32, side, side, 3), dtype=np.uint8)

    def views(device: str) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        images = torch.from_numpy(pixels).to(device)
        return torch.stack(two_views(images, AugmentConfig(), size, generator)).cpu()

    difference = (views("cpu") - views(asked.device)).abs()
    return [
        at_most(f"views, CPU and {asked.other}, largest difference", float(difference.max()), 0.02),
        at_most("views, mean difference", float(difference.mean()), 1e-4),
    ]


def bf16_step(asked: Asked) -> list[Row]:
    """The gradient of one step in bf16 against that in fp32, from the same weights and views."""
    config = _config(asked)
    torch.manual_seed(0)
    model = build_model(config).to(asked.device).to(memory_format=torch.channels_last).train()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    losses, directions = [], []
    for bf16 in (False, True):
        model.load_state_dict(start)
        machine = Machine(device=torch.device(asked.device), bf16=bf16)
        loss, _ = gradients(model, _feed(config, machine), 0, 1, machine)
        losses.append(float(loss))
        found = [p.grad for p in model.trained_parameters() if p.grad is not None]
        directions.append(torch.cat([each.flatten() for each in found]).double())
        model.zero_grad(set_to_none=True)
    cosine = float(torch.nn.functional.cosine_similarity(directions[0], directions[1], dim=0))
    return [
        at_most("bf16 step, loss apart from fp32's", abs(losses[1] - losses[0]), 0.05),
        at_least("bf16 step, cosine of its gradient to fp32's", cosine, 0.9),
    ]


def graph_steps(asked: Asked) -> list[Row]:
    """The losses of ten steps replayed as CUDA graphs against those of plain PyTorch, in fp32."""
    config = _config(asked)
    plain = _losses(config, "off", asked)
    replayed = _losses(config, "graphs" if asked.on_gpu else "off", asked)
    note = "" if asked.on_gpu else "plain against plain: graphs need CUDA"
    return [
        at_most("CUDA graphs, losses apart from plain's", _apart(plain, replayed), 0.05, note=note)
    ]


def _losses(config: TrainConfig, compiled: Compile, asked: Asked) -> list[float]:
    torch.manual_seed(0)
    machine = choose_machine(asked.device, "fp32")
    model: Byol = build_model(config).to(machine.device).train()
    model.to(memory_format=torch.channels_last)
    compile_networks(model, compiled, machine)
    optimizer = build_optimizer(model.trained_parameters(), config.optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    feed = _feed(config, machine)
    losses: list[Any] = []
    for step in range(3 if asked.quick else 10):
        losses.append(gradients(model, feed, step, 1, machine)[0])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.update_target(0.99)
    return [float(loss) for loss in losses]


def _apart(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def _config(asked: Asked) -> TrainConfig:
    return small_config(
        encoder="small" if asked.quick else "resnet18",
        stem="small",
        batch_size=32 if asked.quick else 256,
        optimizer=OptimizerConfig(name="sgd"),
    )


def _feed(config: TrainConfig, machine: Machine) -> Feed:
    pixels = np.random.default_rng(0).integers(0, 256, (1024, 32, 32, 3), dtype=np.uint8)
    return Feed(images_from_arrays(pixels), config, config.batch_size, machine.device)


CHECKS = {
    "ONNX Runtime against golden embeddings": onnx_embeddings,
    "FAISS on the device": faiss_neighbours,
    "views on the device": augmentation,
    "a step in bf16": bf16_step,
    "CUDA graphs": graph_steps,
}
