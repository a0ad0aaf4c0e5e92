"""What adapters (LoRA) need of SGLang on a CPU: it pins memory for them, which takes a GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .flags import settings_of

logger = logging.getLogger(__name__)


class _Unpinned(TorchFunctionMode):
    """Memory is what it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.pin_memory:
            return args[0]
        return func(*args, **{name: value for name, value in (kwargs or {}).items() if name != "pin_memory"})


def on_cpu(server_args: Any) -> dict[str, str]:
    """Fields of SGLang's ServerArgs: of its kernels for adapters, those in torch alone need no GPU."""
    if not (server_args.enable_lora or server_args.lora_paths):
        return {}
    logger.info("Adapters on a CPU: --lora-backend is torch_native.")
    return {"lora_backend": "torch_native"}


def unpinned(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What the function returns where nothing that it makes is pinned."""
    with _Unpinned():
        return function(*args, **kwargs)


def on_this_device(original: Any, manager: Any, *args: Any, server_args: Any, **kwargs: Any) -> None:
    """AROUND LoRAManager.__init__."""
    if server_args.device != "cpu" or not settings_of(server_args).enabled:
        original(manager, *args, server_args=server_args, **kwargs)
        return
    unpinned(original, manager, *args, server_args=server_args, **kwargs)
    backend = manager.lora_backend
    backend.prepare_lora_batch = partial(unpinned, backend.prepare_lora_batch)
