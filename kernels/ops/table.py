"""What kind of kernel each ATen operator needs. Nothing here imports TVM.

Every target is listed once, by category. ``_CHECKS`` narrows an operator to the overload arguments
that its converter or template handles; what it rejects is a library operator.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
from torch.utils._sympy.symbol import SymT, symbol_is_type

POINTWISE = """
abs acos acosh asin asinh atan atanh ceil cos cosh erf erfc exp exp2 expm1 floor frac log log10
log1p log2 neg reciprocal relu relu6 round rsqrt sigmoid sign sgn silu mish sin sinh sqrt square tan
tanh trunc fix logical_not bitwise_not isnan isinf isposinf isneginf isfinite signbit nan_to_num
hardsigmoid hardswish log_sigmoid selu deg2rad rad2deg positive sinc logit round.decimals
special_expit special_log1p special_exp2 special_expm1 special_erf special_sinc
gelu elu celu leaky_relu hardtanh softplus softshrink hardshrink threshold _prelu_kernel
prelu glu
add.Tensor sub.Tensor rsub.Tensor mul.Tensor div.Tensor div.Tensor_mode add.Scalar sub.Scalar
rsub.Scalar mul.Scalar div.Scalar div.Scalar_mode true_divide.Tensor floor_divide
floor_divide.Scalar remainder.Tensor remainder.Scalar fmod.Tensor fmod.Scalar
pow.Tensor_Tensor pow.Tensor_Scalar pow.Scalar float_power.Tensor_Scalar maximum minimum fmax fmin
atan2 hypot copysign.Tensor copysign.Scalar logaddexp xlogy.Tensor
eq.Tensor ne.Tensor lt.Tensor le.Tensor gt.Tensor ge.Tensor
eq.Scalar ne.Scalar lt.Scalar le.Scalar gt.Scalar ge.Scalar
logical_and logical_or logical_xor
bitwise_and.Tensor bitwise_or.Tensor bitwise_xor.Tensor
bitwise_and.Scalar bitwise_or.Scalar bitwise_xor.Scalar
__and__.Tensor __or__.Tensor __xor__.Tensor __and__.Scalar __or__.Scalar __xor__.Scalar
bitwise_left_shift.Tensor bitwise_left_shift.Tensor_Scalar __lshift__.Scalar
bitwise_right_shift.Tensor bitwise_right_shift.Tensor_Scalar __rshift__.Scalar
where.self where.ScalarSelf where.ScalarOther where.Scalar masked_fill.Scalar masked_fill.Tensor
clamp clamp.Tensor clamp_min clamp_max clamp_min.Tensor clamp_max.Tensor clip
lerp.Scalar lerp.Tensor addcmul addcdiv
_to_copy to.dtype to.dtype_layout to.device to.other type_as clone contiguous copy fill.Scalar
fill.Tensor full full_like zeros zeros_like ones ones_like new_zeros new_ones new_full new_empty
empty.memory_format empty_like scalar_tensor arange arange.start arange.start_step eye
linspace batch_norm native_batch_norm _native_batch_norm_legit_no_training
one_hot isclose upsample_bilinear2d upsample_bilinear2d.vec
""".split()

VIEW = """
view view.dtype reshape _unsafe_view _reshape_alias view_as reshape_as flatten.using_ints
unflatten.int permute transpose.int t numpy_T expand expand_as expand_copy broadcast_to squeeze
squeeze.dim squeeze.dims unsqueeze slice.Tensor select.int split.Tensor split_with_sizes split.sizes
chunk unsafe_chunk unsafe_split.Tensor unbind.int movedim.int movedim.intlist swapaxes narrow
diagonal unfold
alias detach lift_fresh_copy lift_fresh lift detach_ dropout feature_dropout alpha_dropout
conj resolve_conj resolve_neg
flip roll cat stack concat repeat repeat_interleave.self_int tile constant_pad_nd pad
pixel_shuffle pixel_unshuffle channel_shuffle tril triu reflection_pad1d reflection_pad2d
replication_pad1d replication_pad2d embedding index_select gather index.Tensor _unsafe_index.Tensor
upsample_nearest1d upsample_nearest1d.vec upsample_nearest2d upsample_nearest2d.vec
select_scatter slice_scatter take_along_dim scatter.value scatter.src scatter_add
""".split()

REDUCE = """
sum sum.dim_IntList mean mean.dim amax amin max min max.dim min.dim prod prod.dim_int any any.dim
any.dims all all.dim all.dims argmax argmin var.correction var.dim var_mean.correction
std.correction std.dim linalg_vector_norm norm.ScalarOpt_dim count_nonzero count_nonzero.dim_IntList
""".split()

ROWS = """
softmax.int _softmax log_softmax.int _log_softmax layer_norm native_layer_norm rms_norm
_fused_rms_norm group_norm native_group_norm logsumexp instance_norm _safe_softmax
""".split()

SCAN = "cumsum cumprod".split()

GEMM = "mm addmm bmm baddbmm linear matmul".split()

CONV = "convolution conv1d conv2d conv1d.padding conv2d.padding _convolution".split()

POOL = """
max_pool1d max_pool2d max_pool2d_with_indices avg_pool1d avg_pool2d adaptive_avg_pool1d
adaptive_avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d
""".split()

ATTENTION = """
scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu
_scaled_dot_product_attention_math
""".split()

TOPK = "topk sort sort.stable argsort argsort.stable".split()

SYMBOLIC = """
sym_size.int sym_stride.int sym_numel sym_storage_offset sym_constrain_range
sym_constrain_range_for_size _assert_scalar _assert_tensor_metadata
""".split()

CATEGORIES = (
    "pointwise",
    "view",
    "reduce",
    "rows",
    "scan",
    "gemm",
    "conv",
    "pool",
    "attention",
    "topk",
    "route",
    "experts",
    "library",
    "symbolic",
)


def _qualified(name: str) -> str:
    if name.startswith("plait."):
        return name
    return f"aten.{name}" if "." in name else f"aten.{name}.default"


CATEGORY: dict[str, str] = {
    _qualified(name): kind
    for kind, names in (
        ("pointwise", POINTWISE),
        ("view", VIEW),
        ("reduce", REDUCE),
        ("rows", ROWS),
        ("scan", SCAN),
        ("gemm", GEMM),
        ("conv", CONV),
        ("pool", POOL),
        ("attention", ATTENTION),
        ("topk", TOPK),
        ("symbolic", SYMBOLIC),
    )
    for name in names
} | {
    "plait.route.default": "route",
    "plait.places.default": "route",
    "plait.routed_linear.default": "experts",
    "plait.take.default": "view",
    "plait.combine.default": "view",
}
"""``str(target)`` of every operator that has a lowering, mapped to its category."""

MOST_WRITES = 16
"""Entries of a scattering index along its dimension: each element compares with all of them."""
DTYPES = frozenset(
    {
        torch.float32,
        torch.float64,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    }
)
"""Element types that kernels handle."""

Check = Callable[[fx.Node], str | None]
_CHECKS: dict[str, list[Check]] = {}


def check(*names: str) -> Callable[[Check], Check]:
    """Registers a function that says why a node of these operators has no lowering (or None).

    An operator may have several.
    """

    def register(function: Check) -> Check:
        for name in names:
            _CHECKS.setdefault(_qualified(name), []).append(function)
        return function

    return register


def category(node: fx.Node) -> str:
    """The kind of kernel that ``node`` (a ``call_function`` node) becomes.

    "symbolic" nodes compute sizes, not tensors. "library" nodes have no lowering here
    (`library_reason` says why). The parts of a tuple have their producer's category.
    """
    if _is_symbolic(node):
        return "symbolic"
    if library_reason(node) is not None:
        return "library"
    return CATEGORY[str(_producer(node).target)]


def library_reason(node: fx.Node) -> str | None:
    """Why ``node`` cannot become a kernel of ours, or None when it can."""
    if node.op != "call_function":
        return f"{node.op} nodes are not operators"
    if _is_symbolic(node):
        return None
    node = _producer(node)
    name = str(node.target)
    if name not in CATEGORY:
        return f"{name} has no lowering"
    for tensor in [*_tensors(node.meta.get("val")), *_input_tensors(node)]:
        if tensor.dtype not in DTYPES:
            return f"{name} has no lowering for {tensor.dtype}"
        if tensor.layout != torch.strided or tensor.is_quantized:
            return f"{name} has no lowering for {tensor.layout} tensors"
    if "val" not in node.meta:
        return f"{name} has no shape information"
    if _depends_on_data(node):  # first, for checks compare sizes
        return f"{name}: a size is known only at run time"
    reason = next(filter(None, (narrowed(node) for narrowed in _CHECKS.get(name, ()))), None)
    return f"{name}: {reason}" if reason else None


def _producer(node: fx.Node) -> fx.Node:
    """The operator that a tuple's part comes from, or the node itself."""
    while node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _is_symbolic(node: fx.Node) -> bool:
    if CATEGORY.get(str(node.target)) == "symbolic":
        return True
    value = node.meta.get("val")
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)) and (
        not isinstance(node.target, torch._ops.OpOverload)
        or str(node.target).startswith("aten.sym_")
    )


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in _tensors(v)]
    return []


def _input_tensors(node: fx.Node) -> list[torch.Tensor]:
    return [t for n in node.all_input_nodes for t in _tensors(n.meta.get("val"))]


def _depends_on_data(node: fx.Node) -> bool:
    """Whether ``node`` makes or takes sizes or numbers that are computed from data.

    A plan knows every address before it runs; such a value lies wherever the library puts it, and
    so do views of it.
    """
    values = [node.meta["val"], *(n.meta.get("val") for n in node.all_input_nodes)]
    numbers = [v for v in values if not isinstance(v, (torch.Tensor, tuple, list))]
    for tensor in (t for v in values for t in _tensors(v)):
        if tensor._has_symbolic_sizes_strides:
            numbers += [*tensor.shape, *tensor.stride(), tensor.storage_offset()]
    return any(
        symbol_is_type(symbol, (SymT.UNBACKED_INT, SymT.UNBACKED_FLOAT))
        for number in numbers
        if isinstance(number, (torch.SymInt, torch.SymFloat, torch.SymBool))
        for symbol in number.node.expr.free_symbols
    )


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """An operator's argument by its schema name, with the schema's default filled in."""
    if name in node.kwargs:
        return node.kwargs[name]
    target: Any = node.target
    for position, spec in enumerate(target._schema.arguments):
        if spec.name == name:
            if position < len(node.args) and not spec.kwarg_only:
                return node.args[position]
            return spec.default_value if spec.has_default_value() else default
    return default


@check("pow.Tensor_Tensor", "pow.Scalar", "pow.Tensor_Scalar")
def _check_pow(node: fx.Node) -> str | None:
    exponent = node.args[1]
    if not node.meta["val"].dtype.is_floating_point and isinstance(exponent, fx.Node):
        return "integer powers known only at run time"
    return None


@check("isclose")
def _check_isclose(node: fx.Node) -> str | None:
    dtypes = {t.dtype.is_floating_point for t in _input_tensors(node)}
    return None if dtypes == {True} else "tolerances of integers"


@check("index.Tensor", "_unsafe_index.Tensor")
def _check_index(node: fx.Node) -> str | None:
    indices: Any = [i for i in node.args[1] if i is not None]  # type: ignore[union-attr]
    if not indices:
        return "no index tensor"
    if any(i.meta["val"].dtype in (torch.bool, torch.uint8) for i in indices):
        return "a mask selects a number of elements known only at run time"
    return None


@check("take_along_dim")
def _check_take_along_dim(node: fx.Node) -> str | None:
    return "no dimension" if argument(node, "dim") is None else None


@check("batch_norm", "native_batch_norm")
def _check_batch_norm(node: fx.Node) -> str | None:
    if argument(node, "training") or argument(node, "train"):
        return "training mode"
    missing = argument(node, "running_mean") is None or argument(node, "running_var") is None
    return "no running statistics" if missing else None


@check("dropout", "feature_dropout", "alpha_dropout")
def _check_dropout(node: fx.Node) -> str | None:
    train = argument(node, "train")
    return "training mode" if train and argument(node, "p") != 0 else None


@check("view.dtype")
def _check_bitcast(node: fx.Node) -> str | None:
    sizes = {t.dtype.itemsize for t in [node.meta["val"], *_input_tensors(node)]}
    return None if len(sizes) == 1 else "the element size changes"


@check("linspace")
def _check_linspace(node: fx.Node) -> str | None:
    if any(isinstance(a, fx.Node) for a in node.args[:3]):
        return "limits known only at run time"
    return None if node.meta["val"].dtype.is_floating_point else "integer elements"


@check("pad")
def _check_pad(node: fx.Node) -> str | None:
    return (
        None
        if argument(node, "value") is None or argument(node, "mode") == "constant"
        else ("a value with a mode that needs none")
    )


@check("one_hot")
def _check_one_hot(node: fx.Node) -> str | None:
    return "the number of classes is data" if argument(node, "num_classes") == -1 else None


@check(
    "fill.Scalar",
    "full",
    "full_like",
    "new_full",
    "scalar_tensor",
    "arange",
    "arange.start",
    "arange.start_step",
    "masked_fill.Scalar",
    "add.Scalar",
    "mul.Scalar",
    "div.Scalar",
)
def _check_scalars(node: fx.Node) -> str | None:
    kinds = (torch.SymFloat, torch.SymBool)
    if any(isinstance(n.meta.get("val"), kinds) for n in node.all_input_nodes):
        return "a scalar that is no integer is known only at run time"
    return None


@check(*SCAN)
def _check_scan(node: fx.Node) -> str | None:
    result = node.meta["val"]
    if result.dtype == torch.bool:
        return "running totals of truth values, which torch refuses"
    return None if result.dim() else "a tensor without dimensions"


@check("plait.combine.default")
def _check_combine(node: fx.Node) -> str | None:
    share = argument(node, "share")
    return None if 0 < share <= MOST_WRITES else f"{share} slots for a cell"


@check("scatter.value", "scatter.src", "scatter_add")
def _check_scatter(node: fx.Node) -> str | None:
    source, index = (argument(node, name).meta["val"] for name in ("self", "index"))
    if not source.dim():
        return "a tensor without dimensions"
    dim = argument(node, "dim") % source.dim()
    writes = index.shape[dim]
    if not isinstance(writes, int) or writes > MOST_WRITES:
        return f"more than {MOST_WRITES} writes along the dimension"
    pairs = enumerate(zip(source.shape, index.shape, strict=True))
    return "the index leaves out rows" if any(a != b for k, (a, b) in pairs if k != dim) else None
