"""The loop, end to end on a few tiny images: resume, checkpoints, budget, refusals."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from byol_serving.errors import InvalidConfig, InvalidSource
from byol_training.byol import Byol
from byol_training.checkpoint import (
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_encoder,
)
from byol_training.config import HeadConfig, OptimizerConfig, TrainConfig
from byol_training.data import Images, Rejected, images_from_arrays
from byol_training.encoders import build_encoder
from byol_training.feed import derive, shuffle
from byol_training.pretrain import Progress, Stop, build_model, pretrain


def tiny_images(count: int = 40, seed: int = 0) -> Images:
    rng = np.random.default_rng(seed)
    return images_from_arrays(rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8))


def tiny_config(**changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "image_size": 16,
        "batch_size": 8,
        "epochs": 4,
        "head": HeadConfig(hidden=16, out=8),
        "device": "cpu",
        "log_every": 3,
        "checkpoint_every_epochs": 1,
    }
    return TrainConfig.small(**settings | changes)


def stop_at(step: int) -> Callable[[Progress], None]:
    def on_step(progress: Progress) -> None:
        if progress.step >= step:
            raise Stop

    return on_step


def assert_same(one: Byol, other: Byol) -> None:
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_stopped_and_resumed_is_uninterrupted(tmp_path: Path, name: Any) -> None:
    images = tiny_images()
    config = tiny_config(optimizer=OptimizerConfig(name=name, lr=0.01, warmup_epochs=1))
    whole = pretrain(images, config, tmp_path / "a")
    pretrain(images, config, tmp_path / "b", on_step=stop_at(9))  # in the midst of an epoch
    torch.manual_seed(123)  # whatever else the process drew in between
    resumed = pretrain(images, config, tmp_path / "b", resume=True)
    assert_same(whole, resumed)
    steps = [line["step"] for line in metrics(tmp_path / "b")]
    assert steps == [line["step"] for line in metrics(tmp_path / "a")]
    assert steps[-1] == 20
    losses = [[line["loss"] for line in metrics(tmp_path / run)] for run in "ab"]
    assert losses[0] == losses[1]


def test_killed_run_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    """A real kill -9, wherever it falls; then the same weights as if it had not."""
    run = tmp_path / "run"
    code = f"""
        import sys
        sys.path[:0] = {sys.path!r}
        from pathlib import Path
        from test_pretrain import pretrain, tiny_config, tiny_images
        pretrain(tiny_images(), tiny_config(epochs=400), Path({str(run)!r}))
    """
    # One thread, as here: another number of them sums in another order.
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], env=environment)
    try:
        wait_for(lambda: len(list_checkpoints(run / "checkpoints")) == 2, process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    state = load_checkpoint(find_checkpoint(run))
    assert state.step >= 10
    model = pretrain(
        tiny_images(), tiny_config(epochs=400), run, resume=True, on_step=stop_at(state.step + 5)
    )
    whole = pretrain(
        tiny_images(), tiny_config(epochs=400), tmp_path / "w", on_step=stop_at(state.step + 5)
    )
    assert_same(model, whole)


def wait_for(done: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert process.poll() is None, "the run ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_run_directory(tmp_path: Path) -> None:
    seen: list[Progress] = []
    images = replace(tiny_images(), rejected=[Rejected(path="x.jpg", reason="empty")])
    pretrain(images, tiny_config(epochs=3), tmp_path, on_step=seen.append)
    assert TrainConfig.from_dict(json.loads((tmp_path / "config.json").read_text())) == tiny_config(
        epochs=3
    )
    rejected = json.loads((tmp_path / "rejected.jsonl").read_text())
    assert rejected == {"path": "x.jpg", "reason": "empty"}
    assert [p.step for p in seen] == [line["step"] for line in metrics(tmp_path)]
    last = metrics(tmp_path)[-1]
    assert last["step"] == last["steps"] == 15
    assert last["epoch"] == last["epochs"] == 3
    assert 0 < last["loss"] < 8
    assert last["images_per_s"] > 0
    assert last["seconds_left"] == 0
    assert last["tau"] < 1
    assert last["spread"] > 0
    names = [p.name for p in list_checkpoints(tmp_path / "checkpoints")]
    assert names == ["step-00000010.ckpt", "step-00000015.ckpt"]


def test_load_encoder(tmp_path: Path) -> None:
    model = pretrain(tiny_images(), tiny_config(epochs=1), tmp_path)
    encoder, config = load_encoder(tmp_path)
    assert config == tiny_config(epochs=1)
    assert not encoder.training
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(encoder(images), model.encoder.eval()(images))
    again, _ = load_encoder(find_checkpoint(tmp_path))
    assert torch.equal(again(images), encoder(images))
    with pytest.raises(InvalidSource, match="no checkpoint"):
        load_encoder(tmp_path / "gone")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign"])
def test_damaged_checkpoint_is_refused(tmp_path: Path, damage: str) -> None:
    pretrain(tiny_images(), tiny_config(epochs=1), tmp_path)
    path = find_checkpoint(tmp_path)
    content = bytearray(path.read_bytes())
    match damage:
        case "truncated":
            content = content[: len(content) // 2]
        case "flipped":
            content[len(content) // 2] ^= 1
        case _:
            content = bytearray(b"PK\x03\x04" + bytes(100))
    path.write_bytes(content)
    with pytest.raises(InvalidSource, match=r"damaged|no checkpoint of"):
        pretrain(tiny_images(), tiny_config(epochs=1), tmp_path, resume=True)


def test_a_half_written_checkpoint_is_not_seen(tmp_path: Path) -> None:
    pretrain(tiny_images(), tiny_config(epochs=1), tmp_path)
    path = find_checkpoint(tmp_path)
    (path.parent / "step-00000099.tmp").write_bytes(path.read_bytes()[:100])
    assert find_checkpoint(tmp_path) == path


def test_budget_ends_the_schedules_on_time(tmp_path: Path) -> None:
    seen: list[Progress] = []
    start = time.monotonic()
    pretrain(
        tiny_images(), tiny_config(max_seconds=4.0, log_every=20), tmp_path, on_step=seen.append
    )
    assert 3.0 < time.monotonic() - start < 6.0
    assert seen[-1].step == seen[-1].steps
    last = metrics(tmp_path)[-1]
    peak = tiny_config().optimizer.lr * 8 / 256
    assert last["lr"] < 0.05 * peak
    assert last["tau"] > 0.999


def test_max_steps(tmp_path: Path) -> None:
    pretrain(tiny_images(), tiny_config(max_steps=7), tmp_path)
    assert metrics(tmp_path)[-1]["step"] == 7


def test_too_few_images(tmp_path: Path) -> None:
    with pytest.raises(InvalidSource, match="3 images are too few for batches of 8"):
        pretrain(tiny_images(3), tiny_config(), tmp_path)
    pretrain(tiny_images(5), tiny_config(epochs=1), tmp_path)  # one batch of 5
    assert metrics(tmp_path)[-1]["step"] == 1


def test_loss_that_is_no_number_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(config: TrainConfig) -> Byol:
        model = build_model(config)
        torch.nn.init.constant_(next(model.predictor.parameters()), float("nan"))
        return model

    monkeypatch.setattr("byol_training.pretrain.build_model", poisoned)
    with pytest.raises(InvalidConfig, match=r"loss became nan by step 3; lower the adamw learning"):
        pretrain(tiny_images(), tiny_config(), tmp_path)
    assert not list_checkpoints(tmp_path / "checkpoints")


def test_resume_refuses_another_run(tmp_path: Path) -> None:
    images, config = tiny_images(), tiny_config(epochs=1)
    pretrain(images, config, tmp_path)
    with pytest.raises(InvalidConfig, match="holds a run already"):
        pretrain(images, config, tmp_path)
    with pytest.raises(InvalidConfig, match=r"settings differ .* seed 0 is now 1"):
        pretrain(images, replace(config, seed=1), tmp_path, resume=True)
    with pytest.raises(InvalidConfig, match="other images"):
        pretrain(tiny_images(seed=1), config, tmp_path, resume=True)
    pretrain(images, replace(config, log_every=1), tmp_path, resume=True)


def test_unknown_device(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="device 'gpu0' cannot be used"):
        pretrain(tiny_images(), tiny_config(device="gpu0"), tmp_path)


def test_shuffle_is_a_function_of_seed_and_epoch() -> None:
    assert torch.equal(shuffle(1, 2, 50), shuffle(1, 2, 50))
    assert not torch.equal(shuffle(1, 2, 50), shuffle(1, 3, 50))
    assert shuffle(1, 2, 50).sort().values.tolist() == list(range(50))
    assert len({derive(s, p, n) for s in (0, 1) for p in ("a", "b") for n in range(9)}) == 36


@pytest.mark.parametrize(
    ("name", "stem", "dim", "last"),
    [("small", "small", 128, 4), ("resnet18", "small", 512, 4), ("resnet50", "imagenet", 2048, 1)],
)
def test_encoders(name: str, stem: str, dim: int, last: int) -> None:
    encoder = build_encoder(name, stem).eval()
    with torch.no_grad():
        images = torch.randn(2, 3, 32, 32)
        features, maps = encoder(images), encoder.feature_maps(images)
    assert encoder.dim == dim
    assert features.shape == (2, dim)
    final = list(maps.values())[-1]
    assert final.shape == (2, dim, last, last)
    torch.testing.assert_close(final.mean((2, 3)), features)


def test_unknown_encoder() -> None:
    with pytest.raises(InvalidConfig, match="'vgg'"):
        build_encoder("vgg")
    with pytest.raises(InvalidConfig, match="'wide'"):
        build_encoder("small", "wide")
