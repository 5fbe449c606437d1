"""Compile every Triton kernel for a Hopper GPU, which need not be there; print which of them use local memory."""

import json

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparity.engine.kernels.block import triton as block
from sparity.engine.kernels.gemv import triton as gemv
from sparity.engine.kernels.prefill import triton as prefill
from sparity.engine.kernels.skip import triton as skip

BLOCK = {"HIGH": 16, "WIDE": 16, "PADDED_HIGH": 16, "PADDED_WIDE": 16, "TOGETHER": 8, "TOKENS": 16, "WIDEN": False}
KERNELS = {
    "one_token": (gemv._one_token, {"P": 4}),
    "tokens": (gemv._tokens, {"P": 8, "WIDEN": False}),
    "add": (gemv._add, {"SIZE": 256}),
    "unpack": (prefill._unpack, {"P": 8}),
    "block": (block._multiply, BLOCK),
    "skip": (skip._partial, {"K": 32, "R": 128, "RULED": True}),
    "finish": (skip._finish, {"SIZE": 256, "FUNCTION": 1}),
}
POINTERS = {
    "masks": "*u8",
    "starts": "*i32",
    "offsets": "*i64",
    "scales": "*fp32",
    "not_finite": "*i32",
    "sums": "*fp32",
}
SKIP = {"thresholds": "*fp32", "centre": "*fp32"}

found = {}
for name, (kernel, constants) in KERNELS.items():
    for stored, dtype, scaled in (("bf16", "bf16", False), ("i8", "fp16", True)):
        constants = {**constants, **({"SCALED": scaled} if "SCALED" in kernel.arg_names else {})}
        types = {
            **POINTERS,
            **(SKIP if name == "skip" else {}),
            "x": f"*{dtype}",
            "values": f"*{stored}",
            "out": f"*{dtype}",
        }
        if name == "block":
            types["columns"] = "*i32"
        signature = {arg: "constexpr" if arg in constants else types.get(arg, "i32") for arg in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        found[f"{name} {stored}"] = ".local" in compiled.asm["ptx"]
print(json.dumps(found))
