"""Devices, precisions, threads, and networks that are compiled or cannot be."""

import pytest
import torch
from torch import Tensor, nn

from byol_serving.errors import InvalidConfig
from byol_training import machine
from byol_training.config import Compile
from byol_training.machine import (
    choose_machine,
    compile_mode,
    compile_networks,
    use_processors,
)


def test_precision_is_what_was_asked_for() -> None:
    assert choose_machine("cpu", "bf16").bf16
    assert not choose_machine("cpu", "fp32").bf16
    with pytest.raises(InvalidConfig, match="device 'moon' cannot be used"):
        choose_machine("moon", "auto")


def test_auto_measures_bf16_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("byol_training.machine.bf16_in_hardware", lambda: True)
    machine._bf16_is_faster.cache_clear()
    chosen = choose_machine("cpu", "auto").bf16
    assert all(choose_machine("cpu", "auto").bf16 == chosen for _ in range(20))  # measured once
    assert machine._bf16_is_faster.cache_info().misses == 1
    monkeypatch.setattr("byol_training.machine.bf16_in_hardware", lambda: False)
    assert not choose_machine("cpu", "auto").bf16


def test_threads_are_shared_by_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert use_processors(1) == 1  # as the user asked
        monkeypatch.delenv("OMP_NUM_THREADS")
        whole = use_processors(1)
        assert use_processors(2) == max(1, whole // 2)
        assert use_processors(1000) == 1
    finally:
        torch.set_num_threads(before)


class Unfit(nn.Module):
    """The compiler has no backend for it here; it must go on without."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_what_cannot_be_compiled_goes_on_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("no compiler on this machine")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", broken)
    network = Unfit()
    compile_networks(network, "on", choose_machine("cpu", "fp32"))
    assert torch.equal(network(torch.ones(3)), torch.full((3,), 2.0))


@pytest.mark.parametrize(
    ("wanted", "cpu", "cuda"),
    [
        ("auto", None, "default"),
        ("on", "default", "default"),
        ("off", None, None),
        ("graphs", "refused", "reduce-overhead"),
    ],
)
def test_how_networks_are_compiled(wanted: Compile, cpu: str | None, cuda: str | None) -> None:
    assert compile_mode(wanted, "cuda") == cuda
    if cpu != "refused":
        assert compile_mode(wanted, "cpu") == cpu
        return
    with pytest.raises(InvalidConfig, match="graphs needs a CUDA device, and this is cpu"):
        compile_networks(Unfit(), wanted, choose_machine("cpu", "fp32"))


def test_auto_does_not_compile_on_a_processor() -> None:
    network = Unfit()
    compile_networks(network, "auto", choose_machine("cpu", "fp32"))
    assert network._compiled_call_impl is None
