"""Every tolerance of the tests, each with its reason. Three kinds, never mixed:

    BACKEND_*    a kernel against its twin, or a twin against its definition: same numbers, other order
    FORMAT_*     decoded against original values: what the codec may lose
    ATTENTION_*  attention over a packed context against attention over the unquantized one

RMS figures are relative: sqrt(sum (x_hat - x)^2 / sum x^2).
"""

from __future__ import annotations

# --- backend against twin ---

#: one rounding rule, so codes, scales and packed bytes are equal bit for bit
BACKEND_BYTES_DIFFER = 0

#: float32 sums in another order than the definition's float64; measured worst 9e-7 (2,048 Gaussian
#: tokens, outputs and LSE of order 1)
BACKEND_ATTEND_FLOAT32 = 5e-6

#: an output is rounded once to the query's dtype: half a unit in the last place of values below 2
BACKEND_ATTEND_ROUNDED = {"float16": 2**-11, "bfloat16": 2**-8}

#: extend sees new tokens as float16, decode sees them in float16 frames: only the order of sums differs
BACKEND_EXTEND_VS_DECODE = 5e-6

#: orthonormal transform of up to 256 float32 values of order 1 and back; measured worst 2.4e-6
BACKEND_ROTATE = 1e-5

# --- format against float ---

#: bits -> RMS of one vector's keys, pooled over 1,536 or more Gaussian vectors. The ideal scalar
#: quantizer has sqrt(0.1175) = 0.343, sqrt(0.03454) = 0.186, sqrt(0.009497) = 0.0975; the scale's
#: rounding to 0.375 octaves adds under 3%
FORMAT_KEY_RMS = {2: 0.352, 3: 0.192, 4: 0.1010}

#: values pay for being unbiased: sqrt(D / (1 - D)) for an ideal distortion D
FORMAT_VALUE_RMS = {2: 0.376, 3: 0.197, 4: 0.1015}

#: rounding to 11 significant bits: 2^-12 / sqrt(3) at worst, for every float16 above 2^-14
FORMAT_RAW_RMS = 2.5e-4

#: bits -> |mean(<v, v_hat> / <v, v>) - 1|. The scale makes it 1 before its rounding; what is left
#: is the change of codes under the rounded scale. Measured worst 0.004
FORMAT_VALUE_BIAS = {2: 0.01, 3: 0.01, 4: 0.01}

#: mean squared error of the codebooks on a unit Gaussian (Max 1960, table I), and the relative
#: deviation allowed: int8 levels and 1e5 samples
FORMAT_DISTORTION = {2: 0.1175, 3: 0.03454, 4: 0.009497}
FORMAT_DISTORTION_DEVIATION = 0.02

#: level units: levels are rounded to whole int8 numbers
FORMAT_LEVEL_ROUNDING = 0.5

# --- attention against unquantized ---

#: (key bits, value bits) -> RMS of the output over 1,024 Gaussian tokens, head_dim 64, scores of
#: variance 1. Value errors average out over tokens as the values themselves do, so their relative
#: size stays that of FORMAT_VALUE_RMS; key errors shift the weights by the relative FORMAT_KEY_RMS
ATTENTION_RMS = {(16, 16): 0.0, (4, 4): 0.16, (4, 3): 0.24, (4, 2): 0.43, (3, 2): 0.46}

#: outputs of order 1 over raw pages and frames: rotated keys and values are rounded to float16
#: (2^-11 relative), which averages out over tokens; measured worst 1.1e-3
ATTENTION_RAW_STEPS = 4e-3
