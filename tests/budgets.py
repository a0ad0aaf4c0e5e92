"""Every tolerance of the tests, each with its reason. Three kinds, never mixed:

    BACKEND_*    a kernel against its twin, or a twin against its definition: same numbers, other order
    FORMAT_*     decoded against original values: what the codec may lose
    ATTENTION_*  attention over a packed context against attention over the unquantized one

RMS figures are relative: sqrt(sum (x_hat - x)^2 / sum x^2).
"""

from __future__ import annotations

# --- backend against twin ---

#: one rounding rule and the same order of sums: bytes are equal bit for bit
BACKEND_BYTES_DIFFER = 0

#: share of a tile's scale nibbles that may differ where a sum over head_dim is taken in another
#: order: float32 decides near ties (a log2 at a half step, two candidates of equal error) either
#: way. Measured 0 of 64,000 for each width
BACKEND_SCALES_DIFFER = 1e-4

#: share of the bytes of codes that may differ for the same reason where the scales are equal: a value
#: within a rounding error of the boundary of two codes. Measured worst 7e-7 (8 million bytes)
BACKEND_CODES_DIFFER = 1e-5

#: float32 sums in another order than the definition's float64; measured worst 9e-7 (2,048 Gaussian
#: tokens, outputs and LSE of order 1..10)
BACKEND_ATTEND_FLOAT32 = 5e-6

#: the same on matrix units, where a float is the sum of two bfloat16 numbers: 2^-17 = 8e-6 of each
#: product is left out. Measured worst 3e-5 of 1 + size
BACKEND_ATTEND_SPLIT = 6e-5

#: an output is rounded once to the query's dtype: half a unit in the last place of values below 2
BACKEND_ATTEND_ROUNDED = {"float16": 2**-11, "bfloat16": 2**-8}

#: the compiled attend_decode rounds the query to int8, one scale for each head, which moves a score
#: by 0.29 * largest / 127 / rms = 0.7% of the scores' own spread. |LSE - float64 twin|, for scores
#: of standard deviation up to 4; measured worst 0.062
BACKEND_ATTEND_INT8_LSE = 0.1

#: relative RMS of a request's output for the same reason; measured worst 0.017. Key codes of 4 bits
#: alone move a score by 10% of the spread
BACKEND_ATTEND_INT8 = 0.025

#: relative RMS of a request's output against a float64 twin that rounds the query alike: what is
#: left is the rounding of probability * value scale, to 1/65025 of its block's largest where a token
#: has 1/128 of all weight, else to 1/255. Measured worst 4e-4
BACKEND_ATTEND_INT8_WEIGHTS = 1e-3

#: attention over pages of two formats, compiled against its twin, in outputs of about 1: the query's 8 bits and near
#: ties of codes, in one layer: measured 0.016
LEVELS_ATTEND = 0.05

#: log-probabilities of a prompt's last quarter behind pages that have been encoded again as `conservative`, not
#: calibrated, mean |difference| from what they were behind `lossless` ones, of words that hardly follow one another:
#: measured 0.18
SUNK_NATS = 0.5

#: log-probabilities of tokens with drafts and without, mean |difference|: the rounding of matrix products of another
#: batch shape, see SERVED_BATCH_NATS. Behind a hit 0.015 to 0.048 (conservative, eight prompts)
SPECULATION_NATS = {"raw": 1e-3, "conservative": 0.1}

#: decode multiplies the same numbers in the same order; only the twin's 2**x is rounded by torch's
#: vector mathematics, one unit in the last place off now and then
BACKEND_DECODE = 2**-22

#: extend sees new tokens as float16, decode sees them in float16 frames: only the order of sums differs
BACKEND_EXTEND_VS_DECODE = 5e-6

#: orthonormal transform of up to 512 float32 values of order 1 and back; measured worst 3.1e-6
BACKEND_ROTATE = 1e-5

#: share of shaped keys that may differ: a value within a rounding error of a boundary, after which the
#: vector's later dims are rounded to other targets. Measured worst 3e-4 (3,072 vectors, head_dim 256)
BACKEND_SHAPED_VECTORS_DIFFER = 2e-3

#: a calibrated basis and back: two float32 matrices whose condition number is at most 1000 ** (1 / 4)
BACKEND_BASIS = 1e-4

#: the CUDA attend_decode rounds queries and weights to 16 bits: 2^-15 of the largest element of a group's queries, and
#: 1/65535 of the largest weight of 64 tokens. Relative RMS of a request's output, and |LSE - float64 twin| for scores
#: of standard deviation up to 4. Measured worst 1.4e-4 (a thousand equal weights beside one that is 1,000 times as
#: large), 4.0e-4
BACKEND_ATTEND_INT16 = 3e-4
BACKEND_ATTEND_INT16_LSE = 8e-4

#: the CUDA attend_decode over raw tokens: query and weights are each the sum of two float16 numbers, 22 bits, and
#: products are summed in float32. Of 1 + size; measured worst 2.9e-6
BACKEND_ATTEND_CUDA_RAW = 1e-5

#: head_dim -> warp instructions of the CUDA attend_decode's main loop for each (token, KV head), any packed format.
#: An H100 has 28 slots at head_dim 128 before memory stops being the limit of K4V2, 142 of bf16. Measured worst 18.3,
#: 26.7, 44.4 (values of 4 bits, sm_80)
GPU_DECODE_INSTRUCTIONS = {64: 20, 128: 28, 256: 47}

#: the same for the tiers' formats, K4V2 and K3V2, at head_dim 128: measured 22.1 and 20.3 on sm_90, 22.4 and 20.5 on
#: sm_80
GPU_DECODE_TIERS_INSTRUCTIONS = 24

#: extend through FlashInfer sees stored tokens, weights and each part's output as 16-bit floats, bfloat16 at worst
#: (2^-9 each): relative RMS of outputs, and |LSE - twin| for scores up to 12. Measured worst 0.0074 and 0.018
EXTEND_DECODED_TO_16_BITS = 0.01
EXTEND_DECODED_TO_16_BITS_LSE = 0.03

#: the gated delta rule token by token against Hugging Face's in chunks, values of order 1, float32; measured worst 4e-6
BACKEND_DELTA_RULE = 2e-5

# --- format against float ---

#: bits -> RMS over 2,048 Gaussian keys. The ideal scalar quantizer has sqrt(0.1175) = 0.3428,
#: sqrt(0.03454) = 0.1858, sqrt(0.009497) = 0.0975; a scale fitted to each vector gains a little,
#: its rounding loses as much. Measured worst 0.3444, 0.1858 (head_dim 256), 0.0974 (512)
FORMAT_KEY_RMS = {2: 0.3460, 3: 0.1870, 4: 0.0977}

#: values pay for being unbiased: sqrt(D / (1 - D)) = 0.3649, 0.1891, 0.0979 for an ideal distortion
#: D, and for their scale's rounding. Measured worst (head_dim 256) 0.3665, 0.1906, 0.0994
FORMAT_VALUE_RMS = {2: 0.3680, 3: 0.1920, 4: 0.1002}

#: rounding to 11 significant bits: 2^-12 / sqrt(3) at worst, for every float16 above 2^-14
FORMAT_RAW_RMS = 2.5e-4

#: bits -> |mean(<v, v_hat> / <v, v>) - 1|. The scale makes it 1 before its rounding; what is left
#: is the change of codes under the rounded scale. Measured worst 0.0031, 0.0025, 0.0010
FORMAT_VALUE_BIAS = {2: 0.005, 3: 0.005, 4: 0.0025}

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

#: mean |difference| in nats between a prompt computed in one go and the same behind its cached first
#: half, tier lossless, SmolLM2-135M, random words: what K4V3 of 350 tokens costs; another context,
#: as after a wrong page, costs 2 nats and more
ATTENTION_HIT_VERSUS_MISS_NATS = 0.5

#: bits -> error of scores with shaped keys over that with plain ones, where four directions of 64 hold 94% of the
#: queries' energy: noise shaping gains the arithmetic over the geometric mean of W's eigenvalues, 12 here, less
#: what basis.QUERY_FLOOR gives away. Measured 0.115, 0.117, 0.115
FORMAT_SHAPED_GAIN = {2: 0.14, 3: 0.14, 4: 0.14}

#: |error that queries see through another's basis, over that through their own, / basis.staleness - 1|, 4-bit keys: the
#: scale that is chosen by a shaped cost, and the grid's ends, are not in the formula. Measured 0.18 at 5.6 times
FORMAT_STALENESS = 0.25

# --- served ---

#: mean |difference| in nats between the calibrated server, K3.5V3.5 by layer, and the model with a plain cache, 200
#: tokens behind a cached prefix of 144. Measured 0.056 (400 behind 288)
SERVED_CALIBRATED_NATS = 0.10

#: largest |difference| in nats between a server of raw pages and stock, float32, random weights: keys and values are
#: rounded to float16. Measured 6e-4 to 1e-3 over some thirty families
SERVED_RAW_NATS = 3e-3

#: mean and largest |difference| in nats between a server of raw pages and transformers in float32, on models that
#: tests/e2e/random_models.py makes. Keys and values rounded to float16 by themselves, with nothing else of ours, cost
#: them up to 1.0e-3 and 5.3e-3 (llama-shaped, head_dim 64 to 512, 108 tokens behind 192); raw pages 7.3e-4 and 3.4e-3
SERVED_RAW_MEAN_NATS = 1e-3
SERVED_RAW_LARGEST_NATS = 1e-2

#: tier -> mean |difference| in nats between a hybrid's server (random weights; 2 of Qwen3-Next's 8 layers attend) and
#: Hugging Face's run of the same weights. Measured worst 9e-5, and 0.14 behind a cached prefix with 8 query heads for a
#: KV head; another context costs 0.2 to 0.7
SERVED_HYBRID_NATS = {"raw": 3e-4, "lossless": 0.2}

#: the same of gpt-oss's shape (every second layer has a window of 64 tokens) over ten windows
SERVED_WINDOWS_NATS = {"raw": SERVED_RAW_MEAN_NATS, "lossless": 0.2}

#: the same between the compiled kernels and their twins: int8 queries and weights, and what near ties in encoding add
SERVED_KERNELS_NATS = 0.05

#: tier -> mean |difference| in nats between a prompt's decoded tokens alone and in a batch of five, from the same
#: cached pages. Matrix products of another batch shape round otherwise (stock SGLang: 1e-5); float16 tails make it 1e-4
#: (raw). Over packed pages the compiled kernels round queries and weights to 8 bits, near ties turn over, and thirty
#: layers spread it: measured worst mean 0.028 of a prompt, 0.34 of a token; with the kernels' twins, which do not round
#: so, 0.006 and 0.05. A wrong page costs 2 nats and more
SERVED_BATCH_NATS = {"raw": 0.002, "lossless": 0.06}

# --- Triton kernels against twin ---

#: attend_decode in Triton rounds the query to 15 bits, and each block's weights to 15 bits of their largest: relative
#: RMS of a request's output, and |LSE - float64 twin|. Measured worst 2.0e-4 (2.7e-4 with a float16 output) and 2.4e-4
BACKEND_ATTEND_INT15 = 5e-4
BACKEND_ATTEND_INT15_LSE = 1e-3

#: the same over raw pages, where each number is two float16 halves: float32 but for the order of sums. Measured 2.1e-6
BACKEND_ATTEND_HALVES = 1e-5

#: attend_extend in Triton rounds float32 queries and new keys, and all weights, to float16 (2^-12): relative RMS of
#: outputs, measured worst 9.5e-4, and |LSE - float64 twin| of scores up to 10, measured 3.2e-3
BACKEND_ATTEND_FLOAT16 = 2e-3
BACKEND_ATTEND_FLOAT16_LSE = 5e-3

#: 2**x of a scale is rounded once more than the twin's, two units in the last place off at worst; measured 2.1e-7
BACKEND_DECODE_EXP2 = 2**-21


# --- on a GPU that is not there (tests/net) ---

#: how often the host waits for the device: SGLang plans step n + 1 while the device runs step n, and a wait ends that
GPU_WAITS_PER_DECODE_STEP = 0
GPU_WAITS_PER_EXTEND_STEP = 0
GPU_WAITS_PER_FINISHED_REQUEST = 0

#: kernels that looking at one layer's queries adds to an extend step, as measured: they are gathered by head, made
#: float32, multiplied, and added or copied to the host
GPU_DRIFT_KERNELS_PER_EXTEND_STEP = 5

#: kernels of a layer in a decode step, as measured at any batch, calibrated or not, with what the kernels' own Python
#: launches (benchmarks/gpu/step.py): enter, store_tokens, attention and leave; Triton's attention reads shared prefixes
#: in a kernel of its own. An eager launch takes 5 us of the host; under a CUDA graph a small kernel takes 2 us
GPU_DECODE_KERNELS_PER_LAYER = {"flashinfer": 4, "triton": 5}

#: kernels of a decode step that are the same for all layers, as measured: its plan's
GPU_DECODE_KERNELS_PER_STEP = 23

#: as many more where layers with windows are a part of the store with pages of its own, as measured: six each say where
#: the page table's and the written pages lie there
GPU_DECODE_KERNELS_PER_WINDOW_PART = 13

# --- the canary ---

#: mean KL in nats between served and raw distributions of tier raw, whose pages round keys and values to float16:
#: measured 4e-8; float32 sums of 21 buckets leave about as much
CANARY_RAW_NATS = 1e-6

# --- on a GPU that is there (benchmarks/gpu) ---

#: share of bytes that a GPU's encode may write otherwise than the definition: its exp2 and log2 are approximations of
#: their own, so a near tie of scales may fall the other way, and that vector's codes with it. Not measured yet
GPU_ENCODED_BYTES_DIFFER = 1e-3

#: rotated numbers below 8 in float16 frames and sinks: sums in another order may round to the number beside
GPU_FRAMES_DIFFER = 4e-3

#: a hit rate by memory against what a cache of that size finds: the bound that it is to keep from 0.5x to 4x. Measured
#: worst 0.0094 over published traces (results/hit-curve.jsonl), 0.011 in a server's 192 pages, where nodes are large
SAMPLED_HIT_RATE = 0.02
