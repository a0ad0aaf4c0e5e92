"""Token eviction: which layers keep how many tokens of a page (schedules), and which tokens (importance)."""

from .expected import ExpectedAttention
from .importance import Importance, keep_top, protect
from .schedules import Adaptive, Even, PreserveEarly, concentration, kept_tokens

__all__ = [
    "Adaptive",
    "Even",
    "ExpectedAttention",
    "Importance",
    "PreserveEarly",
    "concentration",
    "keep_top",
    "kept_tokens",
    "protect",
]
