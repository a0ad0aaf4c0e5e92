"""Plugins of SGLang's for who measures the canary: what a server in production does not do.

uncapped  sequences are run again one after the other, whatever part of the time that takes
switched  while the file that REST names is there, no request is sampled and none is run again
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

REST = "CANARY_RESTS_WHILE_THERE"
_ROOT = Path(__file__).resolve().parents[2]


def install(folder: Path, *names: str) -> dict[str, str]:
    """A distribution in `folder` with these plugins; returns the environment of a server that loads them."""
    info = folder / "canary_plugins-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: canary-plugins\nVersion: 0\n")
    lines = "".join(f"canary_{name} = {__name__}:{name}\n" for name in names)
    (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{lines}")
    paths = [str(folder), str(_ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def uncapped() -> None:
    from sglang_deltastore.observe import canary

    canary.COST_SHARE = 1


def switched() -> None:
    from sglang_deltastore.observe.canary import Canary

    rest = Path(os.environ[REST])

    def unless_it_rests(work: Callable[..., None]) -> Callable[..., None]:
        def done(*args: Any, **kwargs: Any) -> None:
            if not rest.exists():
                work(*args, **kwargs)

        return done

    for name in ("begin", "serve", "run_next"):
        setattr(Canary, name, unless_it_rests(getattr(Canary, name)))
