"""The loop, end to end on a few tiny images: resume, checkpoints, budget, refusals."""

import json
import os
import resource
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

from byol_serving.errors import InvalidConfig, InvalidSource, StoreError
from byol_training.byol import Byol
from byol_training.checkpoint import (
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_encoder,
)
from byol_training.config import OptimizerConfig, TrainConfig
from byol_training.data import Rejected, images_from_arrays
from byol_training.feed import Feed, derive, shuffle
from byol_training.pretrain import Progress, build_model, pretrain
from training.support import assert_same, metrics, stop_at, tiny_config, tiny_images


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
        from training.support import pretrain, tiny_config, tiny_images
        pretrain(tiny_images(), tiny_config(epochs=400), Path({str(run)!r}))
    """
    # One thread, as here: another number of them sums in another order.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
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
    with pytest.raises(InvalidConfig, match=r"loss became nan at step 1, on 0000\d+, .* lower the"):
        pretrain(tiny_images(), tiny_config(), tmp_path)
    assert not list_checkpoints(tmp_path / "checkpoints")
    names = (tmp_path / "no-number.txt").read_text().splitlines()
    assert len(names) == 8
    assert set(names) <= set(tiny_images().names)


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


def test_identical_images_are_refused(tmp_path: Path) -> None:
    same = images_from_arrays(np.full((20, 16, 16, 3), 7, np.uint8))
    with pytest.raises(InvalidSource, match="all 20 images are identical"):
        pretrain(same, tiny_config(), tmp_path)


def test_the_target_moves_once_a_step_however_many_micro_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taus: list[float] = []
    update = Byol.update_target

    def counted(model: Byol, tau: float) -> None:
        taus.append(tau)
        update(model, tau)

    monkeypatch.setattr(Byol, "update_target", counted)
    pretrain(tiny_images(), tiny_config(accumulate=4, epochs=1), tmp_path)
    assert len(taus) == 5
    assert taus == sorted(set(taus))


def test_micro_batches_sum_to_the_gradient_of_their_mean(tmp_path: Path) -> None:
    """Without batch norm a step in four parts is the step in one."""

    def train(accumulate: int) -> Byol:
        config = tiny_config(
            accumulate=accumulate,
            max_steps=3,
            precision="fp32",
            optimizer=OptimizerConfig(name="sgd", lr=1.0, warmup_epochs=0),
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("byol_training.pretrain.build_model", without_norms)
            return pretrain(tiny_images(), config, tmp_path / str(accumulate))

    for (name, a), b in zip(
        train(1).state_dict().items(), train(4).state_dict().values(), strict=True
    ):
        torch.testing.assert_close(a, b, msg=name)


def without_norms(config: TrainConfig) -> Byol:
    """A model whose images do not see each other."""
    model = build_model(config)
    for parent in [m for m in model.modules() if isinstance(m, torch.nn.Sequential)]:
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
                setattr(parent, name, torch.nn.Identity())
    return model


def test_micro_batches_share_one_draw_a_batch() -> None:
    """Each image has its own draw, the same whether the batch is cut or not."""
    images = images_from_arrays(np.repeat(tiny_images(1).pixels, 16, axis=0))
    whole = Feed(images, tiny_config(), 8, torch.device("cpu")).views(1)
    cut = Feed(images, tiny_config(accumulate=2), 8, torch.device("cpu"))
    for view, parts in zip(whole, zip(cut.views(1, 0), cut.views(1, 1), strict=True), strict=True):
        torch.testing.assert_close(view, torch.cat(parts))
        assert len({tuple(image.flatten().tolist()) for image in view}) == 8


def test_images_on_disk_are_read_ahead_and_come_out_the_same(tmp_path: Path) -> None:
    images = tiny_images()
    np.save(tmp_path / "p.npy", images.pixels)
    mapped = replace(images, pixels=np.load(tmp_path / "p.npy", mmap_mode="c"))
    assert mapped.on_disk
    assert not images.on_disk
    config = tiny_config(accumulate=2)
    ahead, plain = (Feed(i, config, 8, torch.device("cpu")) for i in (mapped, images))
    for step in (0, 1, 4, 5, 2):  # in turn, over an epoch's end, and out of turn as after a resume
        for micro in (0, 1):
            for a, b in zip(ahead.views(step, micro), plain.views(step, micro), strict=True):
                assert torch.equal(a, b)


def test_a_kill_within_a_checkpoint_write_leaves_the_one_before(tmp_path: Path) -> None:
    """Killed when the bytes are written and not yet under their name: the worst moment."""
    run = tmp_path / "run"
    code = f"""
        import os, sys, time
        sys.path[:0] = {sys.path!r}
        from pathlib import Path
        from training.support import pretrain, tiny_config, tiny_images
        syncs = []
        def sync(descriptor):
            syncs.append(descriptor)
            if len(syncs) == 5:  # a file and its folder for each checkpoint: within the third
                print("writing", flush=True)
                time.sleep(600)
        os.fsync = sync
        pretrain(tiny_images(), tiny_config(), Path({str(run)!r}))
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"writing\n"
        finally:
            process.send_signal(signal.SIGKILL)
    assert list((run / "checkpoints").glob("*.tmp"))
    assert load_checkpoint(find_checkpoint(run)).step == 10
    resumed = pretrain(tiny_images(), tiny_config(), run, resume=True)
    assert_same(resumed, pretrain(tiny_images(), tiny_config(), tmp_path / "whole"))
    assert not list((run / "checkpoints").glob("*.tmp"))


def test_full_disk_says_so_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain(tiny_images(), tiny_config(), tmp_path, on_step=stop_at(5))
    before = find_checkpoint(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # a checkpoint has millions
    try:
        with pytest.raises(StoreError, match=r"cannot be written \(File too large\); make room"):
            pretrain(tiny_images(), tiny_config(), tmp_path, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [before.name]
    pretrain(tiny_images(), tiny_config(), tmp_path, resume=True)


@pytest.mark.parametrize(
    "changes",
    [{"views": 3}, {"target_norm": "average"}],
)
def test_options_train_and_resume(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = tiny_config(max_steps=4, tau_batch=4, **changes)
    whole = pretrain(tiny_images(), config, tmp_path / "a")
    pretrain(tiny_images(), replace(config, log_every=1), tmp_path / "b", on_step=stop_at(2))
    assert_same(whole, pretrain(tiny_images(), config, tmp_path / "b", resume=True))


def test_on_epoch_sees_every_pass(tmp_path: Path) -> None:
    seen: list[int] = []
    config = tiny_config(max_steps=12)
    pretrain(tiny_images(), config, tmp_path, on_epoch=lambda model, step: seen.append(step))
    assert seen == [5, 10, 12]


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="an extra of its own")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pretrain(tiny_images(), tiny_config(max_steps=6, tensorboard=True), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    points = events.Scalars("loss")
    lines = metrics(tmp_path)
    assert [p.step for p in points] == [line["step"] for line in lines]
    assert [p.value for p in points] == pytest.approx([line["loss"] for line in lines])


def test_a_run_keeps_the_precision_that_was_chosen_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for faster in (True, False):
        monkeypatch.setattr("byol_training.machine.bf16_in_hardware", lambda: True)
        monkeypatch.setattr("byol_training.machine._bf16_is_faster", lambda faster=faster: faster)
        config, resume = tiny_config(precision="auto"), not faster
        pretrain(tiny_images(), config, tmp_path, resume=resume, on_step=stop_at(3))
        assert json.loads((tmp_path / "config.json").read_text())["precision"] == "bf16"


def test_bf16_learns_as_fp32_does(tmp_path: Path) -> None:
    """The same seed in both: the losses stay the same to within their noise."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (64, 4, 4, 3), dtype=np.uint8)
    images = images_from_arrays(coarse.repeat(4, axis=1).repeat(4, axis=2))
    losses = {}
    for precision in ("fp32", "bf16"):
        optimizer = OptimizerConfig(name="adamw", lr=0.02, warmup_epochs=0)
        config = tiny_config(
            batch_size=32, max_steps=30, log_every=10, precision=precision, optimizer=optimizer
        )
        pretrain(images, config, tmp_path / precision)
        losses[precision] = [line["loss"] for line in metrics(tmp_path / precision)]
    assert losses["fp32"][-1] < 0.9 * losses["fp32"][0]  # something was learned
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.1)
