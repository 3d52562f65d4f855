"""Accelerators that are not there: tensors that compute on the CPU and say that they are elsewhere.

Inside `accelerators()` a tensor on such a device meets what a real one would: operations on tensors
of two devices fail, those with the CPU's tensors too unless these are numbers or indices, and so
does every operation in float64, which some accelerators have none of.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

aten = torch.ops.aten
# which take tensors of several devices: copies, and indices on the CPU
ACROSS_DEVICES = {
    aten.copy_.default,
    aten._to_copy.default,
    *map(aten.to.__getattr__, aten.to.overloads()),
}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}
FIRST, SECOND = "elsewhere:0", "elsewhere:1"


class Elsewhere(Tensor):
    """A tensor whose numbers, `here`, lie on the CPU, though it says another device."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor, device: torch.device) -> Elsewhere:
        outside = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, here.size(), strides=here.stride(), dtype=here.dtype, device=device
        )
        outside.here = here
        return outside

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of accelerators()")


class Accelerators(TorchDispatchMode):
    """Runs operations on tensors that are elsewhere, where a real device would."""

    def __init__(self) -> None:
        super().__init__()
        self.n_operations = 0
        self.n_copies = 0  # of tensors from the CPU

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_flatten((args, kwargs))[0]
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        elsewhere = [x for x in tensors if isinstance(x, Elsewhere)]
        targets = [x for x in leaves if isinstance(x, torch.device)]  # of a copy or of a new tensor
        if not elsewhere and all(target.type == "cpu" for target in targets):
            return func(*args, **kwargs)
        self.n_operations += 1
        self.n_copies += not elsewhere and bool(tensors)
        check_devices(func, tensors, elsewhere)
        device = targets[0] if targets else elsewhere[0].device
        wrappers = {id(x.here): x for x in elsewhere}
        here = func(*tree_map(bring_here, args), **tree_map(bring_here, kwargs))

        def send(x: Any) -> Any:
            if not isinstance(x, Tensor) or device.type == "cpu":
                return x
            if id(x) in wrappers:
                given = wrappers[id(x)]
                if given.device == device:  # in place, or nothing to copy
                    return given
                x = x.clone()
            if x.dtype == torch.float64:
                raise RuntimeError(f"{func} makes float64 on {device}")
            with torch.inference_mode(False):  # a view of a weight is no tensor of inference
                return Elsewhere(x, device)

        return tree_map(send, here)


class NewTensors(TorchFunctionMode):
    """Does on the CPU what torch would ask the device for before any Python: `tolist`, making a
    tensor of a list, an index that is a list."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.tolist:
            return func(args[0].cpu())
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            args = (args[0], index_of(args[1]), *args[2:])
        device = kwargs.pop("device", None) if func is torch.tensor else None
        made = func(*args, **kwargs)
        return made if device is None else made.to(device)


def index_of(index: Any) -> Any:
    """An index in which lists are tensors."""
    if isinstance(index, tuple):
        return tuple(map(index_of, index))
    return torch.tensor(index) if isinstance(index, list) else index


def bring_here(x: Any) -> Any:
    """What an operation on the CPU takes in place of an argument."""
    if isinstance(x, torch.device):
        return torch.device("cpu")
    return x.here if isinstance(x, Elsewhere) else x


def check_devices(func: Any, tensors: list[Tensor], elsewhere: list[Elsewhere]) -> None:
    """`RuntimeError` where a real device would refuse these tensors together."""
    if func in ACROSS_DEVICES:
        return
    devices = {x.device for x in elsewhere}
    others = [x for x in tensors if not isinstance(x, Elsewhere) and x.ndim > 0]
    if func in INDEXING and isinstance(tensors[0], Elsewhere):
        others = []
    if len(devices) > 1 or (others and devices):
        raise RuntimeError(f"{func}: tensors on {sorted({str(x.device) for x in tensors})}")


class Backend(_DummyBackendModule):
    """What torch asks of a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_is_set_up: list[bool] = []


@contextlib.contextmanager
def accelerators() -> Iterator[Accelerators]:
    """Devices elsewhere:0 and :1 exist meanwhile."""
    if not _is_set_up:
        _setup_privateuseone_for_python_backend("elsewhere", backend_module=Backend())
        _is_set_up.append(True)
    with NewTensors(), Accelerators() as mode:
        yield mode


def move(module: nn.Module, device: str) -> None:
    """Put the weights and buffers of a module on a device."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                moved = Elsewhere(bring_here(weight).detach(), torch.device(device))
                part._parameters[name] = nn.Parameter(moved, requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = Elsewhere(bring_here(buffer), torch.device(device))


def place(model: Any, second_from: int | None = None) -> Any:
    """The model on the first device; its blocks from one on, and what follows them, on the second,
    as accelerate's hooks have it."""
    move(model, FIRST)
    if second_from is None:
        return model
    later = [*model.model.layers[second_from:], model.model.norm, model.lm_head]
    for module in later:
        move(module, SECOND)
        add_hook_to_module(module, AlignDevicesHook(torch.device(SECOND), io_same_device=False))
    return model
