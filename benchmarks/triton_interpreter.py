"""Triton's interpreter with the arithmetic of a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def mend_bfloat16() -> None:
    """Make the interpreter round to bfloat16 and multiply it; as it comes, it truncates and multiplies bit patterns.

    Checked with triton 3.7.1: its interpreter stores bfloat16 as uint16, ``create_dot`` passes these to numpy, and
    ``_convert_float`` drops the low bits.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if getattr(builder, "bfloat16_is_mended", False):
        return
    dot, cast = builder.create_dot, builder.cast_impl

    def widened(value: Any) -> Any:
        if value.dtype.scalar != tl.bfloat16:
            return value
        return handle((value.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, target)
        rounded = torch.from_numpy(np.array(source.data)).bfloat16()
        return handle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    builder.create_dot, builder.cast_impl, builder.bfloat16_is_mended = create_dot, cast_impl, True
