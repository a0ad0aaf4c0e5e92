"""What SGLang lacks to start on a machine without a GPU: kernels to import, a switch, a small model.

    eval "$(deltastore env)"
    python -m sglang.launch_server --device cpu --dtype "$(deltastore dtype)" --model-path "$(deltastore model)"

From Python, call `activate()` before the first `import sglang`. Nothing here imports SGLang, and
importing this package neither changes the process nor loads torch.
"""

from .dtype import cpu_dtype, cpu_flags, serving_dtype
from .embedded import MODELS, ModelError
from .environment import activate, needs_cpu_engine, needs_standin, variables
from .models import model_path

__all__ = [
    "MODELS",
    "ModelError",
    "activate",
    "cpu_dtype",
    "cpu_flags",
    "model_path",
    "needs_cpu_engine",
    "needs_standin",
    "serving_dtype",
    "variables",
]
