"""A thin layer over TVM's IR builder for writing kernels that follow `kernels.abi`.

Loops are written with the builder itself (``T.serial``, ``T.unroll``, ``T.vectorized``);
this module adds the function frame, strided tensor access and stack temporaries::

    em = Emitter("scale", inputs=[x], outputs=[y], symbols=())
    with em.function() as tasks:          # for t in range(lo, hi)
        with T.vectorized(16) as j:
            em.outputs[0].store(em.inputs[0].load([tasks, j]) * em.f32(2.0), [tasks, j])
    func = em.finish()
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import sympy
import torch
import tvm.ir as ir
import tvm.tirx as tir
from torch.utils._sympy import functions as sympy_functions
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from .abi import Dim, Kernel, Pack, TensorArg, compulsory_bytes

Expr = Any  # tvm.tirx.Expr: TVM ships no type information
ON_STACK = {"disable_lower_builtin": 1}
_open: list[Any] = []  # emitters inside ``with emitter.function()``
_HUGE = 1 << 40  # declared extent of a buffer whose size only the caller knows


def tvm_dtype(dtype: torch.dtype) -> str:
    """TVM's name for a torch dtype as it lies in memory (bool is one byte)."""
    name = str(dtype)[6:]
    return "int8" if name == "bool" else name


def compute_dtype(dtype: torch.dtype) -> str:
    """TVM's name for a torch dtype as a value in an expression (bool is bool)."""
    return str(dtype)[6:]


class Ref:
    """A tensor argument inside a kernel: strided loads and stores at logical indices."""

    def __init__(self, emitter: Emitter, arg: TensorArg, data: Expr) -> None:
        self.arg = arg
        self.shape = [emitter.dim(d) for d in arg.shape]
        self.strides = [emitter.dim(s) for s in arg.strides]
        self.buffer = T.decl_buffer((_HUGE,), tvm_dtype(arg.dtype), data=data)

    def offset(self, index: Sequence[Expr]) -> Expr:
        """Element offset of a logical index (which may reach into the halo)."""
        total: Expr = tir.IntImm("int64", 0)
        for i, stride in zip(index, self.strides, strict=True):
            total = total + i * stride
        return total

    def load(self, index: Sequence[Expr]) -> Expr:
        return self.load_flat(self.offset(index))

    def load_flat(self, offset: Expr) -> Expr:
        value = self.buffer[offset]
        return value != tir.IntImm("int8", 0) if self.arg.dtype == torch.bool else value

    def store(self, value: Expr, index: Sequence[Expr]) -> None:
        self.store_flat(value, self.offset(index))

    def store_flat(self, value: Expr, offset: Expr) -> None:
        value, want = plain(value), tvm_dtype(self.arg.dtype)
        if expr_dtype(value) != want:
            value = tir.Cast(want, value)
        T.buffer_store(self.buffer, value, [offset])

    def prefetch(self, index: Sequence[Expr], write: bool = False) -> None:
        """Asks for the cache line of an element, to be written or only read some time later."""
        place = tir.address_of(self.buffer[self.offset(index)])
        how = [tir.IntImm("int32", k) for k in (write, 3, 1)]  # keep it in all caches; data
        T.evaluate(tir.call_llvm_intrin("void", "llvm.prefetch", place, *how))


class Emitter:
    """Builds one PrimFunc ``name(lo, hi, inputs..., outputs..., symbols...)``."""

    def __init__(
        self,
        name: str,
        inputs: Sequence[TensorArg],
        outputs: Sequence[TensorArg],
        symbols: Sequence[str] = (),
    ) -> None:
        self.name = name
        self._inputs, self._outputs, self._symbols = list(inputs), list(outputs), list(symbols)
        self._builder = IRBuilder()
        self._vars: dict[str, Expr] = {}
        self._scratch: list[Expr] = []
        self._imports: list[str] = []
        self.inputs: list[Ref] = []
        self.outputs: list[Ref] = []

    @contextlib.contextmanager
    def function(self) -> Iterator[Expr]:
        """Opens the function and its task loop; yields the task number (int64)."""
        with self._builder, T.prim_func():
            T.func_name(self.name)
            lo, hi = T.arg("lo", T.int64()), T.arg("hi", T.int64())
            data = [
                T.arg(f"{kind}{i}", T.handle(tvm_dtype(a.dtype)))
                for kind, args in (("in", self._inputs), ("out", self._outputs))
                for i, a in enumerate(args)
            ]
            for symbol in self._symbols:
                self._vars[symbol] = T.arg(symbol, T.int64())
            T.func_attr({"global_symbol": self.name, "tirx.noalias": True, "calling_conv": 1})
            refs = [
                Ref(self, a, d) for a, d in zip(self._inputs + self._outputs, data, strict=True)
            ]
            self.inputs = refs[: len(self._inputs)]
            self.outputs = refs[len(self._inputs) :]
            with T.serial(lo, hi) as task:
                _open.append(self)
                try:
                    yield task
                finally:
                    _open.pop()

    def is_size(self, var: Expr) -> bool:
        """Whether a variable is one of the symbols."""
        return any(var.same_as(v) for v in self._vars.values())

    def finish(self) -> Any:
        """The PrimFunc; call it once, after the ``function`` context has ended."""
        func = self._builder.get()
        if self._scratch:
            marks = {name: tir.IntImm("int32", value) for name, value in ON_STACK.items()}
            allocations = [tir.AllocBuffer(b, annotations=marks) for b in self._scratch]
            func = func.with_body(tir.SeqStmt([*allocations, func.body]))
        for text in self._imports:
            zero, code = tir.IntImm("int32", 0), ir.StringImm(text)
            func = func.with_body(tir.AttrStmt(zero, "pragma_import_llvm", code, func.body))
        return func

    def kernel(
        self,
        tasks: Dim,
        config: dict[str, Any],
        *,
        flops: Dim = 0,
        packs: Sequence[Pack | None] = (),
        func: Any = None,
    ) -> Kernel:
        """The finished kernel; ``func`` where it is not just what `finish` returns."""
        inputs, outputs = tuple(self._inputs), tuple(self._outputs)
        return Kernel(
            name=self.name,
            func=self.finish() if func is None else func,
            inputs=inputs,
            outputs=outputs,
            symbols=tuple(self._symbols),
            tasks=tasks,
            packs=tuple(packs) or (None,) * len(inputs),
            flops=flops,
            bytes=compulsory_bytes(inputs + outputs),
            config=config,
        )

    @staticmethod
    def active() -> Emitter | None:
        """The emitter whose function is being written, if any."""
        return _open[-1] if _open else None

    # -- values ---------------------------------------------------------------------------

    def dim(self, value: Dim) -> Expr:
        """A dimension as an int64 expression over the kernel's symbol parameters."""
        if isinstance(value, int):
            return tir.IntImm("int64", value)
        return sympy_to_tir(value, self._vars)

    def local(self, size: int, dtype: str = "float32") -> Expr:
        """A temporary of ``size`` elements on the task's stack (in registers where LLVM can)."""
        return T.alloc_buffer((size,), dtype, annotations=ON_STACK)

    def scratch(self, size: int, dtype: str) -> Expr:
        """A temporary like `local`, but allocated at the function's entry.

        Unlike `local` it may be asked for inside a vectorised loop.
        """
        buffer = tir.decl_buffer((size,), dtype, name="scratch")
        self._scratch.append(buffer)
        return buffer

    def import_llvm(self, text: str) -> None:
        """Makes functions in LLVM's language known to the kernel; once for each text.

        Several kernels of a module may import a text: its functions must be ``linkonce_odr``.
        """
        if text not in self._imports:
            self._imports.append(text)

    @staticmethod
    def f32(value: float) -> Expr:
        return tir.FloatImm("float32", value)

    @staticmethod
    def i64(value: int) -> Expr:
        return tir.IntImm("int64", value)


def sympy_to_tir(expr: Any, variables: dict[str, Expr]) -> Expr:
    """Translates a sympy integer expression; raises NotImplementedError for unknown functions."""
    if isinstance(expr, int) or expr.is_Integer:
        return tir.IntImm("int64", int(expr))
    if expr.is_Symbol:
        return variables[expr.name]
    args = [sympy_to_tir(a, variables) for a in expr.args]
    if expr.is_Add or expr.is_Mul:
        total = args[0]
        for a in args[1:]:
            total = total + a if expr.is_Add else total * a
        return total
    if isinstance(expr, sympy.Pow) and expr.args[1].is_Integer and expr.args[1] > 0:
        total = args[0]
        for _ in range(int(expr.args[1]) - 1):
            total = total * args[0]
        return total
    if isinstance(expr, (sympy_functions.FloorDiv, sympy_functions.CleanDiv)):
        top, by = expr.args
        if top.is_nonnegative and by.is_nonnegative and not by.is_number:
            # The same, which TVM would not see: it repeats both for every sign that they may have.
            return tir.truncdiv(*args)
        return tir.floordiv(*args)
    if isinstance(expr, (sympy_functions.Mod, sympy_functions.PythonMod, sympy.Mod)):
        return tir.floormod(args[0], args[1])
    if isinstance(expr, (sympy.Max, sympy_functions.Max)):
        total = args[0]
        for a in args[1:]:
            total = tir.max(total, a)
        return total
    if isinstance(expr, (sympy.Min, sympy_functions.Min)):
        total = args[0]
        for a in args[1:]:
            total = tir.min(total, a)
        return total
    raise NotImplementedError(f"size expression {expr} has no lowering ({type(expr).__name__})")


def plain(value: Expr) -> Expr:
    """An expression for what ``==`` and ``!=`` return in TVM: objects that are not one yet."""
    return value.asobject() if hasattr(value, "asobject") else value


def expr_dtype(value: Expr) -> str:
    """The scalar dtype of an expression, lanes left out."""
    return str(value.ty.dtype).split("x")[0]
