"""What the cases of kernels share that ``lowrank_kernels.compile`` compiles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

# Label, kernel, signature, constants, options: see lowrank_kernels.compile.
AotCase: TypeAlias = tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]
# Types of values and of an index, whose columns are of 16 bits, in the cases of the kernels of sparse matrices.
SPARSE = (("bf16", "*i16"), ("bf16", "*i32"), ("bf16", "*i64"), ("fp32", "*i16"))


def aot_case(label: str, kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any]) -> AotCase:
    """A case for ``lowrank_kernels.compile``.

    Args:
        types: of the arguments that are neither pointers (``..._ptr``) to fp32 nor int32.
        constants: of constexprs, None for pointers that are absent, and with how many warps and stages it is launched.
    """
    options = {name: constants[name] for name in ("num_warps", "num_stages") if name in constants}
    constants = {name: value for name, value in constants.items() if name not in options}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    return label, kernel, signature, constants, options
