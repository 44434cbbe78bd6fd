"""Matrix products on CPUs: linear, mm, addmm, bmm, baddbmm and matmul with a fused epilogue.

See `gemm_body` for the loops, `gemm_epilogue` for what is fused, `gemm_model` for the tile sizes.
fp32, bf16 and fp16 (both sum in fp32); rows and batches, inner and outer sizes may be symbols.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from ..abi import Kernel, Pack, ceil_div, symbol_names
from ..emit import Emitter
from ..group import IO, Group, Unsupported
from ..target import Target
from .gemm_body import Body, Tiling
from .gemm_epilogue import Epilogue
from .gemm_model import in_pairs, tilings
from .gemm_spec import ANCHORS, GemmSpec, parse
from .half_factors import leave_to_tiles

__all__ = ["ANCHORS", "candidates", "lower"]


def candidates(group: Group, io: IO, target: Target) -> list[dict[str, Any]]:
    """Up to five configurations (keys ri, nv, mc, kc), the likely best first.

    Raises `Unsupported` for a group that `lower` would decline whatever the configuration.
    """
    spec = _checked(group, io, target)
    return [{"ri": t.ri, "nv": t.nv, "mc": t.mc, "kc": t.kc} for t in tilings(spec, target)]


def lower(
    group: Group, io: IO, target: Target, config: dict[str, Any], name: str = "kernel"
) -> Kernel:
    """Lowers a group around a matrix product.

    Raises `Unsupported` for dtypes, operands and epilogues the template does not cover, ValueError
    for a configuration that is not of the form `candidates` gives.
    """
    spec = _checked(group, io, target)
    tiling = Tiling(**config, lanes=target.vector_bytes // 4)
    if min(tiling.ri, tiling.nv, tiling.mc, tiling.kc) < 1 or tiling.mc % tiling.ri:
        raise ValueError(f"impossible tile sizes {config}")
    inputs = tuple(io[n] for n in group.inputs)
    outputs = tuple(io[n] for n in group.outputs)
    symbols = symbol_names((*inputs, *outputs))
    pairs = in_pairs(spec, target)
    em = Emitter(name, inputs, outputs, symbols)
    tasks = spec.batches * ceil_div(spec.m, tiling.mc) * ceil_div(spec.n, tiling.width)
    with em.function() as task:
        epilogue = Epilogue(em, spec, group, tiling.lanes)
        refs = dict(zip(group.inputs, em.inputs, strict=True))
        if tasks == 0:
            T.evaluate(0)
        else:
            Body(em, spec, tiling, epilogue, refs[spec.a], refs[spec.b], pairs).task(task)
    layout: list[tuple[str, Any]] = [("width", tiling.width), ("transposed", spec.b_transposed)]
    if pairs:
        layout.append(("pairs", True))
    pack = Pack("gemm_panels", tuple(layout))
    return em.kernel(
        tasks,
        config,
        flops=spec.flops,
        packs=tuple(pack if spec.b_const and n is spec.b else None for n in group.inputs),
    )


def _checked(group: Group, io: IO, target: Target) -> GemmSpec:
    if target.kind != "cpu":
        raise Unsupported("PLT-GEM-002", f"this template does not generate code for {target.kind}")
    spec = parse(group, io)
    leave_to_tiles(target, spec.dtype, spec.flops)
    return spec
