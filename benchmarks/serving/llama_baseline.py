"""Time per output token of llama.cpp by context: flash attention, KV as f16, q8_0 or q4_0.

`times` is asked by the benchmark and starts this file in the interpreter that has `llama-cpp-python`, because that
package is compiled at install and nothing else here needs it.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

#: KV type -> its number in ggml's enum ggml_type
KV_TYPES = {"f16": 1, "q4_0": 2, "q8_0": 8}
ANSWER_TOKENS = 16
_WORD = 1000
_BATCH_TOKENS = 512


def times(python: Path, gguf: Path, kv_type: str, contexts: list[int], threads: int) -> dict[int, float]:
    """Milliseconds per output token behind each context; the median of ANSWER_TOKENS single steps.

    Raises subprocess.CalledProcessError where `python` has no llama_cpp.
    """
    command = [str(python), __file__, str(gguf), kv_type, str(threads), *map(str, sorted(contexts))]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return {int(context): ms for context, ms in json.loads(found.stdout).items()}


def main(gguf: str, kv_type: str, threads: str, *contexts: str) -> None:
    from llama_cpp import Llama

    longest = max(map(int, contexts)) + ANSWER_TOKENS
    model = Llama(
        gguf, n_ctx=longest, n_batch=_BATCH_TOKENS, n_threads=int(threads), n_threads_batch=int(threads),
        flash_attn=True, type_k=KV_TYPES[kv_type], type_v=KV_TYPES[kv_type], verbose=False,
    )  # fmt: skip
    found = {}
    for context in map(int, contexts):
        model.eval([_WORD] * (context - model.n_tokens))
        steps_ms = []
        for _ in range(ANSWER_TOKENS):
            begin = time.perf_counter()
            model.eval([_WORD])
            steps_ms.append((time.perf_counter() - begin) * 1000)
        found[context] = statistics.median(steps_ms)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
