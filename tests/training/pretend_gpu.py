"""A GPU that is not there: its tensors have shapes and a device, and no numbers.

What runs on it shows two mistakes that no processor shows, and that few notice on a GPU: tensors of
two devices in one operation (an error there), and a host that waits for the device. Operations on
the CPU's tensors alone are done as ever.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda", 0)


class PretendGpu(FakeTensorMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """A mode: `with PretendGpu(...) as gpu`; afterwards `gpu.waits` says where the host waited."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.waits: list[str] = []
        self._pinned: dict[int, Tensor] = {}  # kept, so that their memory stays theirs
        monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: self._pin(tensor))

    def _pin(self, tensor: Tensor) -> Tensor:
        pinned = tensor.clone()
        self._pinned[pinned.data_ptr()] = pinned
        return pinned

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        fake = any(isinstance(each, FakeTensor) for each in given)
        device = kwargs.get("device")
        to_gpu = isinstance(device, torch.device) and device.type == "cuda"
        if not fake and not to_gpu:
            return func(*args, **kwargs)
        self._watch(func, given, kwargs, to_gpu=to_gpu)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _watch(
        self, func: Any, given: list[Tensor], kwargs: Mapping[str, object], *, to_gpu: bool
    ) -> None:
        copied = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        devices = {each.device.type for each in given}
        if func is torch.ops.aten._local_scalar_dense.default:
            self.waits.append("a value was read")
        elif func is torch.ops.aten.nonzero.default:
            self.waits.append("a number of elements was read")
        elif copied and "cuda" in devices and kwargs.get("device") == torch.device("cpu"):
            self.waits.append("a tensor was read")
        elif copied and to_gpu and devices == {"cpu"}:
            pinned = all(each.data_ptr() in self._pinned for each in given)
            if not (pinned and kwargs.get("non_blocking")):
                self.waits.append("something was sent from memory that is not pinned")
