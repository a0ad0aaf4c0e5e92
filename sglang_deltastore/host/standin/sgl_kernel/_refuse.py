"""The one behaviour of every stand-in op: to say that it is none."""

from collections.abc import Callable
from typing import Any, NoReturn


def refusing(name: str) -> Callable[..., NoReturn]:
    """A function called `name` that raises RuntimeError whatever it is given."""

    def op(*_args: Any, **_kwargs: Any) -> NoReturn:
        raise RuntimeError(
            f"sgl_kernel.{name} was called, but this is DeltaStore's stand-in for sgl_kernel, which "
            f"computes nothing. SGLang's CPU path needs it for none of the models DeltaStore "
            f"supports: turn off the option that asked for it (speculative decoding, a kernel "
            f"backend), or run on a machine where the real sgl_kernel loads."
        )

    op.__name__ = op.__qualname__ = name
    return op
