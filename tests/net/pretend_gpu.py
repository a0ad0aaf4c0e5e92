"""A GPU that is not there: tensors that say they lie on `cuda`, and hold their numbers on the host.

Inside `pretend_gpu()` code for a GPU runs with true numbers on a machine without one, and is watched: what it launches,
and where the host would have to wait for the device. What real tensors refuse is refused: operands on two devices.

    kernels   operations on device tensors, by name; views and allocations launch nothing
    launches  the same in order, each with the bytes that it reads and writes at least
    waits     reads of device values, copies to the host or from pageable memory that block, and operations whose
              result's shape only the device knows; each with the place in our code that asked
"""

from __future__ import annotations

import math
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
_HERE = Path(__file__)

#: operations whose result's shape the host learns from the device
_SHAPE_FROM_VALUES = frozenset(
    ["nonzero", "masked_select", "unique", "_unique2", "unique_dim", "unique_consecutive", "bincount"]
)


class Watch:
    """What was launched and waited for."""

    def __init__(self) -> None:
        self.kernels: Counter[str] = Counter()
        self.launches: list[tuple[str, float]] = []
        self.waits: list[str] = []

    @property
    def launched(self) -> int:
        return sum(self.kernels.values())

    def launch(self, name: str, moved_bytes: float = 0) -> None:
        self.kernels[name] += 1
        self.launches.append((name, moved_bytes))

    def wait(self, why: str) -> None:
        """Remember a wait, and the innermost line outside of torch and of this file that asked for it."""
        frames = [
            frame
            for frame in traceback.extract_stack()
            if Path(frame.filename) != _HERE and f"{torch.__path__[0]}/" not in frame.filename
        ]
        asked = frames[-1]
        place = "/".join(Path(asked.filename).parts[-3:])
        self.waits.append(f"{why}: {place}:{asked.lineno} ({asked.line})")

    @property
    def our_waits(self) -> list[str]:
        """Those of DeltaStore itself."""
        return [wait for wait in self.waits if "sglang_deltastore/" in wait or "deltastore_kernels/" in wait]


class DeviceTensor(torch.Tensor):
    """A tensor on the pretended device; `numbers` are its values, on the host."""

    watch: ClassVar[Watch | None] = None
    numbers: torch.Tensor

    @staticmethod
    def __new__(cls, numbers: torch.Tensor) -> DeviceTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls, numbers.shape, strides=numbers.stride(), storage_offset=numbers.storage_offset(), dtype=numbers.dtype,
            device=CUDA,
        )  # fmt: skip
        made.numbers = numbers
        return made

    def __repr__(self) -> str:
        return f"DeviceTensor({self.numbers!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__.split(".")[0]
        watch = _watch()
        _check_devices(name, [*args, *kwargs.values()], watch)
        if name == "_local_scalar_dense":
            watch.wait("a value is read")
        elif name in _SHAPE_FROM_VALUES or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            watch.wait(f"{name}: the host waits for its shape")
        elif name in ("index", "index_put_", "index_put") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        ):
            watch.wait("a mask as index: the host waits for how many there are")
        given = [_numbers(x) for x in tree_leaves((args, kwargs)) if isinstance(x, DeviceTensor)]
        inner = func(*tree_map(_numbers, args), **{**tree_map(_numbers, kwargs), **_on_host(kwargs)})
        in_place = name.endswith("_") and not name.endswith("__") and isinstance(args[0], DeviceTensor)
        if in_place or not (name.startswith(("empty", "new_empty")) or _are_views(inner, given)):
            watch.launch(name, _moved_bytes(name, given, tree_leaves(inner)))
        if in_place:
            return args[0]
        return tree_map(lambda x: DeviceTensor(x) if isinstance(x, torch.Tensor) else x, inner)


def _watch() -> Watch:
    assert DeviceTensor.watch is not None, "a device tensor is used outside of pretend_gpu()"
    return DeviceTensor.watch


def _numbers(x: Any) -> Any:
    return x.numbers if isinstance(x, DeviceTensor) else x


def _are_views(results: Any, given: list[torch.Tensor]) -> bool:
    """Whether an operation has only looked at its operands in another way: nothing was launched."""
    storages = {tensor.untyped_storage().data_ptr() for tensor in given}
    tensors = [x for x in tree_leaves(results) if isinstance(x, torch.Tensor)]
    return all(tensor.untyped_storage().data_ptr() in storages for tensor in tensors)


#: operations that read of their first operand what they return
_GATHERS = frozenset(["index", "gather", "index_select"])


def _moved_bytes(name: str, given: list[Any], results: list[Any]) -> float:
    """Each operand read once and each result written once; what is repeated by a stride of 0 is read once."""
    if name in _GATHERS:
        given = [*results, *given[1:]]
    elif name in ("copy_", "fill_"):
        given = given[1:]
    tensors = [x for x in (*given, *results) if isinstance(x, torch.Tensor)]
    return sum(
        math.prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride) * x.element_size()
        for x in tensors
    )


def _on_host(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"device": torch.device("cpu")} if kwargs.get("device") is not None else {}


def _check_devices(name: str, operands: list[Any], watch: Watch) -> None:
    """As torch: a number may come from the host; an index may, and is copied first; nothing else."""
    flat: list[torch.Tensor] = []
    for operand in operands:
        many = operand if isinstance(operand, list | tuple) else [operand]
        flat += [x for x in many if isinstance(x, torch.Tensor)]
    strangers = [x for x in flat if not isinstance(x, DeviceTensor) and x.dim()]
    if not strangers or len(strangers) == len(flat) or name in ("copy_", "_to_copy"):
        return
    if name in ("index", "index_put_", "index_put") and isinstance(operands[0], DeviceTensor):
        if name != "index" and not isinstance(operands[2], DeviceTensor) and operands[2].dim():
            raise RuntimeError(f"{name}: expected all tensors on one device, found values on cpu and self on cuda:0")
        watch.wait("an index comes from pageable memory")
        return
    raise RuntimeError(f"{name}: expected all tensors to be on the same device, found at least two, cuda:0 and cpu")


class _Factories(TorchFunctionMode):
    """Makes tensors for `device="cuda"`, moves them, and tells pinned memory from pageable."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in _MOVES and args and isinstance(args[0], torch.Tensor):
            return _MOVES[name](func, args[0], args[1:], kwargs)
        if kwargs.get("pin_memory"):
            kwargs.pop("pin_memory")
            return _pinned(func(*args, **kwargs))
        if (device := kwargs.get("device")) is not None and torch.device(device).type == "cuda":
            if args and isinstance(args[0], DeviceTensor):  # new_zeros and the like
                return func(*args, **kwargs)
            kwargs["device"] = "cpu"
            if name in ("tensor", "as_tensor", "asarray"):
                _watch().wait("a tensor is made of values on the host")
                return DeviceTensor(func(*args, **kwargs))
            made = func(*args, **kwargs)
            _watch().launch(name, made.nbytes)
            return DeviceTensor(made)
        return func(*args, **kwargs)


#: pinned tensors by where their storage begins, kept so that nothing else comes to lie there
_PINNED: dict[int, torch.Tensor] = {}


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    _PINNED[tensor.untyped_storage().data_ptr()] = tensor
    return tensor


def _is_pinned(tensor: torch.Tensor) -> bool:
    """Views of a pinned tensor are."""
    return tensor.untyped_storage().data_ptr() in _PINNED


def _move(func: Any, tensor: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Tensor.to, to the pretended device, from it, or neither."""
    wanted = [a for a in (*args, kwargs.get("device")) if isinstance(a, str | torch.device | int)]
    wanted += [a.device for a in args if isinstance(a, torch.Tensor)]
    target = torch.device(wanted[0]).type if wanted else tensor.device.type
    if target == tensor.device.type:
        if isinstance(tensor, DeviceTensor):
            rest = [a for a in args if not isinstance(a, str | torch.device)]
            kwargs.pop("device", None)
            kwargs.pop("non_blocking", None)
            return func(tensor, *rest, **kwargs) if rest or kwargs else tensor
        return func(tensor, *args, **kwargs)
    blocking = not kwargs.pop("non_blocking", False)
    kwargs["device"], rest = "cpu", [a for a in args if isinstance(a, torch.dtype)]
    if target == "cuda":
        if blocking or not _is_pinned(tensor):
            _watch().wait("a copy from pageable memory")
        _watch().launch("copy_to_device", tensor.nbytes)
        return DeviceTensor(func(tensor, *rest, **kwargs).clone())
    _watch().wait("a copy to the host")
    return func(tensor.numbers, *rest, **kwargs).clone()


def _to_host(func: Any, tensor: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Tensor.cpu, .tolist, .numpy."""
    if not isinstance(tensor, DeviceTensor):
        return func(tensor, *args, **kwargs)
    _watch().wait(f"{func.__name__}: a copy to the host")
    return func(tensor.numbers, *args, **kwargs)


def _read(func: Any, tensor: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
    """int(tensor), bool(tensor), tensor.item()."""
    if isinstance(tensor, DeviceTensor):
        _watch().wait("a value is read")
    return func(_numbers(tensor), *args, **kwargs)


def _pin(func: Any, tensor: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
    return _pinned(tensor.clone())


def _copy(func: Any, tensor: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Tensor.copy_ on the device, or between it and the host."""
    source = args[0]
    on_host = [x for x in (tensor, source) if not isinstance(x, DeviceTensor)]
    if len(on_host) == 2:
        return func(tensor, *args, **kwargs)
    asynchronous = kwargs.get("non_blocking") or (len(args) > 1 and args[1])
    if on_host and not (asynchronous and _is_pinned(on_host[0])):
        _watch().wait("a copy between host and device that blocks")
    _watch().launch("copy_")
    _numbers(tensor).copy_(_numbers(source))
    return tensor


def _index_parts(index: Any) -> list[torch.Tensor]:
    """The tensors in an index expression; each is looked at for what it makes the host wait for."""
    parts = [part for part in (index if isinstance(index, tuple) else (index,)) if isinstance(part, torch.Tensor)]
    for part in parts:
        if not isinstance(part, DeviceTensor) and part.dim():
            _watch().wait("an index comes from pageable memory")
        elif isinstance(part, DeviceTensor) and not part.dim() and part.dtype != torch.bool:
            _watch().wait("a value is read, as an index")
    return parts


def _get(func: Any, tensor: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
    """tensor[index]. torch would ask the driver which device is the current one."""
    if not isinstance(tensor, DeviceTensor):
        return func(tensor, *args, **kwargs)
    parts = _index_parts(args[0])
    if any(part.dtype == torch.bool for part in parts):
        _watch().wait("a mask as index: the host waits for how many there are")
    found = func(tensor.numbers, tree_map(_numbers, args[0]))
    if parts:
        _watch().launch("index", _moved_bytes("index", [], [found]))
    return DeviceTensor(found)


def _set(func: Any, tensor: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> None:
    """tensor[index] = value."""
    if not isinstance(tensor, DeviceTensor):
        return func(tensor, *args, **kwargs)
    index, value = args
    parts, many = _index_parts(index), isinstance(value, torch.Tensor) and value.dim() > 0
    if many and not isinstance(value, DeviceTensor):
        raise RuntimeError("index_put_: expected all tensors on one device, found values on cpu and self on cuda:0")
    if many and any(part.dtype == torch.bool for part in parts):
        _watch().wait("a mask as index: the host waits for how many there are")
    moved = [_numbers(value)] if many else []
    _watch().launch("index_put_" if parts else "copy_" if many else "fill_", _moved_bytes("", moved, moved))
    return func(tensor.numbers, tree_map(_numbers, index), _numbers(value))


def _contiguous(func: Any, tensor: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    if not isinstance(tensor, DeviceTensor):
        return func(tensor, *args, **kwargs)
    return tensor if tensor.numbers.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)


_MOVES: dict[str, Callable[..., Any]] = {
    "contiguous": _contiguous, "__invert__": lambda func, tensor, args, kwargs: torch.bitwise_not(tensor),
    "__getitem__": _get, "__setitem__": _set,
    **dict.fromkeys(("__int__", "__bool__", "__float__", "__index__", "item"), _read),
    "to": _move, "cpu": _to_host, "tolist": _to_host, "numpy": _to_host, "pin_memory": _pin, "copy_": _copy,
    "cuda": lambda func, tensor, args, kwargs: _move(torch.Tensor.to, tensor, ("cuda",), kwargs),
}  # fmt: skip


class _Event:
    """torch.cuda.Event: whatever was launched is done."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def record(self, *_args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


@contextmanager
def pretend_gpu() -> Iterator[Watch]:
    """Watch what is done to tensors on `cuda` inside."""
    watch = Watch()
    patches = (
        mock.patch.object(DeviceTensor, "watch", watch),
        mock.patch("torch.cuda.Event", _Event),
        mock.patch("torch.cuda.current_device", lambda: 0),
    )
    with patches[0], patches[1], patches[2], torch.inference_mode(), _Factories():
        yield watch
    _PINNED.clear()
