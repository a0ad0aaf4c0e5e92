"""Triton's interpreter, mended: true bfloat16, and the inline PTX that the kernels use.

Triton 3.8's interpreter keeps bfloat16 as uint16 and calculates with the bits; numpy has the real type from ml_dtypes.
It also knows no inline assembly; `run_ptx` knows the few instructions of ops/_triton_asm.py, so that the very text
that ptxas gets is what runs here.

Import before kernels are launched, with TRITON_INTERPRET=1 in the environment.
"""

from __future__ import annotations

import re
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_native_np_dtype = interpreter._get_np_dtype
_Builder = interpreter.InterpreterBuilder
_native_load, _native_store, _native_dot = (
    _Builder.create_masked_load,
    _Builder.create_masked_store,
    _Builder.create_dot,
)


def _np_dtype(dtype: tl.dtype) -> np.dtype:
    return BFLOAT16 if dtype.scalar == tl.bfloat16 else _native_np_dtype(dtype)


def _as_bits(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
    data = np.ascontiguousarray(handle.data)
    return interpreter.TensorHandle(data.view(np.uint16), tl.uint16) if data.dtype == BFLOAT16 else handle


def _load(self, pointers, mask, other, *options):
    if pointers.get_element_ty() != tl.bfloat16:
        return _native_load(self, pointers, mask, other, *options)
    bits = interpreter.TensorHandle(pointers.data, tl.pointer_type(tl.uint16))
    loaded = _native_load(self, bits, mask, None if other is None else _as_bits(other), *options)
    return interpreter.TensorHandle(loaded.data.view(BFLOAT16), tl.bfloat16)


def _store(self, pointers, value, mask, *options):
    return _native_store(self, pointers, _as_bits(value), mask, *options)


def _cast(self, source, dtype):
    return interpreter.TensorHandle(source.data.astype(_np_dtype(dtype)), dtype.scalar)


def _dot(self, left, right, *rest):
    assert BFLOAT16 not in (left.data.dtype, right.data.dtype), "no kernel here multiplies bfloat16"
    return _native_dot(self, left, right, *rest)


def _inline_asm(self, asm, constraints, values, types, is_pure, pack):
    """Four elements at a time: a register of bytes, or two of float16."""
    assert pack == 4, "written for four bytes in a register"
    shape = values[0].data.shape
    inputs = [np.ascontiguousarray(value.data).reshape(-1).view(np.uint32) for value in values]
    registers = run_ptx(asm, inputs, outputs=constraints.count("="))
    per_result = len(registers) // len(types)
    handles = []
    for i, dtype in enumerate(types):
        words = np.stack(registers[i * per_result : (i + 1) * per_result], axis=-1)
        element = dtype.scalar
        handles.append(interpreter.TensorHandle(words.view(_np_dtype(element)).reshape(shape), element))
    return SimpleNamespace(get_result=handles.__getitem__)


interpreter._get_np_dtype = _np_dtype
_Builder.create_masked_load, _Builder.create_masked_store = _load, _store
_Builder.cast_impl, _Builder.create_dot, _Builder.create_inline_asm = _cast, _dot, _inline_asm


def run_ptx(asm: str, inputs: list[np.ndarray], outputs: int) -> list[np.ndarray]:
    """The inline PTX over arrays of uint32 words: operands $0 .. are the outputs, then the inputs."""
    registers = {f"${outputs + i}": words for i, words in enumerate(inputs)}

    def read(name: str) -> np.ndarray:
        return np.full_like(inputs[0], int(name, 0)) if name[0].isdigit() else registers[name]

    for line in asm.split(";"):
        instruction = line.strip(" \n{}")
        if not instruction or instruction.startswith(".reg"):
            continue
        name, operands = instruction.split(maxsplit=1)
        target, *sources = re.split(r",\s*", operands)
        registers[target] = PTX[name](*map(read, sources))
    return [registers[f"${i}"] for i in range(outputs)]


def _prmt(low: np.ndarray, high: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """PTX ISA, prmt in its default mode: nibble i of the selector chooses byte i among eight; its top bit would
    repeat that byte's sign instead."""
    candidates = np.stack([low >> (8 * i) & 255 for i in range(4)] + [high >> (8 * i) & 255 for i in range(4)])
    result = np.zeros_like(low)
    for i in range(4):
        nibble = selector >> (4 * i) & 15
        byte = np.take_along_axis(candidates, (nibble & 7)[None].astype(np.int64), 0)[0]
        byte = np.where(nibble & 8, np.where(byte & 128, 255, 0), byte).astype(np.uint32)
        result |= byte << (8 * i)
    return result


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """PTX ISA, lop3: bit (4 a + 2 b + c) of the table, for every bit."""
    result = np.zeros_like(a)
    for row in range(8):
        if table[0] >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result


def _sub_f16x2(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a.view(np.float16) - b.view(np.float16)).view(np.uint32)


PTX = {
    "mov.b32": np.copy,
    "and.b32": np.bitwise_and,
    "or.b32": np.bitwise_or,
    "xor.b32": np.bitwise_xor,
    "sub.f16x2": _sub_f16x2,
    "shl.b32": np.left_shift,
    "shr.u32": np.right_shift,
    "lop3.b32": _lop3,
    "prmt.b32": _prmt,
}
