"""Stand-in for `sgl_kernel.scalar_type`: names of weight formats that SGLang puts into tables.

SGLang compares these and prints them at import; the kernels that would read them do not exist here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ScalarType:
    """A weight format by name; two of the same name are equal."""

    name: str


class scalar_types:
    """The formats named by SGLang 0.5.23."""

    uint4 = ScalarType("uint4")
    uint8 = ScalarType("uint8")
    uint4b8 = ScalarType("uint4b8")
    uint8b128 = ScalarType("uint8b128")
    float4_e2m1f = ScalarType("float4_e2m1f")
    float8_e4m3fn = ScalarType("float8_e4m3fn")
