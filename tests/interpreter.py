"""Repairs of Triton's interpreter, which tests without a GPU run the Triton kernels in.

As of Triton 3.7 it converts float32 to bfloat16 by truncation (hardware rounds to nearest even), multiplies the bit
patterns of bfloat16 tiles in tl.dot, and warns of every overflow that IEEE arithmetic allows. With the repairs bfloat16
is rounded as the GPU does, and dot multiplies values and sums in float32. It also makes triton.language its own anew at
every call of one jit function by another (tl.sum is one), which took two thirds of the time; now it does so once a
launch. What it knows of a shape (its number of elements, its text) and of a dtype goes from one tensor to the next,
which halves what was left. Sums by exclusive or, of which tl.sort and tl.topk are made, went element by element through
Python; now they are numpy's. `repair()` is called once, before any kernel.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import cache, wraps

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle


def to_float32(bits: np.ndarray) -> np.ndarray:
    """bfloat16 as uint16 bits -> float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 as uint16 bits, to nearest, ties to even; NaN stays NaN."""
    values = np.asarray(values, dtype=np.float32, order="C")
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16).reshape(values.shape)


def _values(handle: Handle) -> np.ndarray:
    return to_float32(handle.data) if handle.dtype.scalar == tl.bfloat16 else handle.data


@cache
def _languages(function: Callable) -> frozenset:
    """The modules of Triton's language that the text of a jit function names."""
    named = function.__globals__.values()
    return frozenset(module for module in (tl, tl.core) if any(value is module for value in named))


def _remember_shapes_and_dtypes() -> None:
    """Types of blocks, and tensors, that differ by their numbers alone share what says so."""
    language, plain_type = tl.core, tl.core.block_type.__init__
    known: dict[tuple, tuple] = {}
    dtypes: dict[str, np.dtype] = {}
    plain_dtype, plain_equal = interpreter._get_np_dtype, language.dtype.__eq__
    plain_broadcast = TritonSemantic.broadcast_impl_value

    def block_type(self, element_ty, shape):
        sizes = tuple([x.value if isinstance(x, language.constexpr) else x for x in shape])
        if sizes not in known:
            plain_type(self, element_ty, shape)
            known[sizes] = self.shape, self.numel, str(self.shape)
        self.element_ty = element_ty
        self.shape, self.numel, text = known[sizes]
        self.name = f"<{text}, {element_ty}>"

    @cache
    def of_tensor(sizes):
        return language.constexpr(math.prod(sizes)), language.tuple([language.constexpr(size) for size in sizes])

    def tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = of_tensor(tuple(type.shape) if type.is_block() else ())

    def np_dtype(of):
        scalar = of.element_ty if isinstance(of, language.block_type) else of
        if scalar.name not in dtypes:
            dtypes[scalar.name] = plain_dtype(scalar)
        return dtypes[scalar.name]

    def broadcast(self, left, right):
        alike = left.type.is_block() and right.type.is_block() and left.type.shape is right.type.shape
        return (left, right) if alike else plain_broadcast(self, left, right)

    def equal(self, other):
        return self is other or plain_equal(self, other)

    language.block_type.__init__, language.tensor.__init__, language.dtype.__eq__ = block_type, tensor, equal
    TritonSemantic.broadcast_impl_value, interpreter._get_np_dtype = broadcast, np_dtype


def repair() -> None:
    _remember_shapes_and_dtypes()
    plain_cast, plain_fp_to_fp, plain_launch, plain_reduce, plain_patch = (
        Builder.cast_impl,
        Builder.create_fp_to_fp,
        interpreter.GridExecutor.__call__,
        interpreter.ReduceOps.apply_impl,
        interpreter._patch_lang_tensor,
    )

    def cast(self, source, target_type):
        target = target_type.scalar
        if tl.bfloat16 not in (source.dtype.scalar, target) or source.dtype.scalar == target:
            return plain_cast(self, source, target_type)
        values = _values(source)
        if target == tl.bfloat16:
            return Handle(to_bfloat16(values), target)
        return Handle(values.astype(interpreter._get_np_dtype(target)), target)

    def fp_to_fp(self, source, target_type, rounding_mode):
        if tl.bfloat16 in (source.dtype.scalar, target_type.scalar):
            return cast(self, source, target_type)
        if {source.dtype.scalar, target_type.scalar} <= {tl.float16, tl.float32, tl.float64}:
            return plain_cast(self, source, target_type)
        return plain_fp_to_fp(self, source, target_type, rounding_mode)

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        product = np.matmul(_values(a).astype(d.data.dtype), _values(b).astype(d.data.dtype))
        return Handle(product + d.data, d.dtype.scalar)

    def reduce(self, some):
        if self.combine_fn is not tl.standard._xor_combine:
            return plain_reduce(self, some)
        (x,) = some
        return self.to_tensor(np.bitwise_xor.reduce(x.handle.data, axis=self.axis, keepdims=self.keep_dims), x.dtype)

    def patch_tensor(tensor, *scope):
        plain_patch(tensor, *scope)
        # Triton 3.6 calls int of an array of one element, which NumPy takes for scalars alone by now.
        tensor.__index__ = lambda self: int(self.handle.data.item())

    ready: set = set()  # the modules of Triton's language that this launch has made the interpreter's

    @wraps(plain_launch)
    def launch(self, *args, **kwargs):
        ready.clear()
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All-NaN (slice|axis) encountered")  # tl.max of nothing but NaN
            return plain_launch(self, *args, **kwargs)

    def call(self, *args, **kwargs):
        if not _languages(self.fn) <= ready:
            interpreter._patch_lang(self.fn)
            ready.update(_languages(self.fn))
        return self.rewrite()(*args, **kwargs)

    Builder.cast_impl, Builder.create_fp_to_fp, Builder.create_dot = cast, fp_to_fp, dot
    interpreter.ReduceOps.apply_impl, interpreter._patch_lang_tensor = reduce, patch_tensor
    for name in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc"):
        setattr(Builder, f"create_{name}", cast)
    interpreter.GridExecutor.__call__, interpreter.InterpretedFunction.__call__ = launch, call
