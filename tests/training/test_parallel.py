"""Two processes take the steps that one takes; a resumed run may have another number of them."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from byol_serving.errors import InvalidConfig
from byol_training.byol import Byol
from byol_training.checkpoint import find_checkpoint, load_checkpoint
from byol_training.config import OptimizerConfig, TrainConfig
from byol_training.parallel import World, check_parts
from byol_training.pretrain import pretrain
from training.support import metrics, tiny_config, tiny_images


def settings(steps: int) -> TrainConfig:
    """SGD, whose steps are as large as the gradient: what differs would show."""
    optimizer = OptimizerConfig(name="sgd", lr=0.05, warmup_epochs=0)
    return tiny_config(batch_size=16, accumulate=2, max_steps=steps, optimizer=optimizer)


def in_two_processes(run: Path, steps: int, *, stop: int) -> None:
    code = f"""
        import sys
        sys.path[:0] = {sys.path!r}
        from pathlib import Path
        from byol_training.parallel import joined
        from training.support import pretrain, stop_at, tiny_images
        from training.test_parallel import settings
        with joined("cpu"):
            pretrain(
                tiny_images(), settings({steps}), Path({str(run)!r}),
                resume=True, on_step=stop_at({stop}),
            )
    """
    script = run.with_suffix(".py")
    script.write_text(textwrap.dedent(code))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, "--standalone", str(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def assert_close(model: Byol, run: Path) -> None:
    state = load_checkpoint(find_checkpoint(run)).model
    for name, value in model.state_dict().items():
        torch.testing.assert_close(state[name], value, atol=2e-5, rtol=2e-4, msg=name)


def test_two_processes_are_one(tmp_path: Path) -> None:
    """Micro-batches, batch norm over both, gradients, sharding; then alone from where they were."""
    whole = pretrain(tiny_images(), settings(6), tmp_path / "one")
    in_two_processes(tmp_path / "two", 6, stop=3)
    assert load_checkpoint(find_checkpoint(tmp_path / "two")).step == 3
    alone = pretrain(tiny_images(), settings(6), tmp_path / "two", resume=True)
    assert_close(alone, tmp_path / "one")
    assert_close(whole, tmp_path / "two")
    losses = [[line["loss"] for line in metrics(tmp_path / run)] for run in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_batches_that_cannot_be_shared() -> None:
    check_parts(World(size=4), 16, 2)
    with pytest.raises(InvalidConfig, match="16 images cannot be shared by 3 processes in 1 micro"):
        check_parts(World(size=3), 16, 1)
    with pytest.raises(InvalidConfig, match="multiple of 16, at least 32"):
        check_parts(World(size=4), 16, 4)


def test_parts_cover_the_batch_once() -> None:
    rows = [
        row
        for rank in range(2)
        for micro in range(3)
        for row in range(24)[World(rank=rank, size=2).part(24, 3, micro)]
    ]
    assert sorted(rows) == list(range(24))
