"""PTX for kernels written in Python: single instructions, and macros made of them.

An `Instruction` is one line of PTX; `instruction` makes one that kernels call. A `macro` is a Python function of
registers that runs while a kernel compiles: its loops are unrolled, its lists are registers. Its body sees an `emit`
that one instruction or macro after the other is given to, so the same body can be typed, compiled, and run by an
emulator of a warp (tests). Addresses are integers: int64 in global memory, int32 in shared memory. Knows no kernel and
no torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

if not hasattr(np, "row_stack"):  # numba-cuda 0.30 names row_stack at its first compile, numpy 2.5 has dropped it
    vars(np)["row_stack"] = np.vstack

from llvmlite import ir
from numba import cuda
from numba.cuda import cgutils
from numba.cuda import types as nt
from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

# The types that a constraint letter of PTX has in LLVM and in numba.
LLVM_TYPES = {"r": ir.IntType(32), "l": ir.IntType(64), "f": ir.FloatType()}
NUMBA_TYPES = {"r": nt.int32, "l": nt.int64, "f": nt.float32}


@dataclass(frozen=True)
class Instruction:
    """One PTX instruction.

    `text` numbers results and operands, results first. Each has a letter: r for int32, l for int64, f for float32.
    """

    text: str
    results: str = ""
    operands: str = ""
    effect: bool = False  # it touches memory that others write, or synchronizes, so it is kept, and kept in order
    warp: bool = False  # all lanes take part, so it must not move into or out of a branch
    predicated: bool = False  # the last operand is an int32; lanes where it is 0 do nothing, and their result is -1

    def at(self, offset: int) -> Instruction:
        """The same access `offset` bytes further; an offset in the text costs neither a register nor an addition."""
        return replace(self, text=self.text.replace("]", f"+{offset}]", 1))

    def asm(self) -> str:
        if not self.predicated:
            return self.text
        # NVVM passes no one-bit operands to inline assembly, so the predicate is made here.
        last = len(self.results) + len(self.operands) - 1
        default = "mov.b32 $0, -1; " if self.results else ""
        return f"{{.reg .pred p; setp.ne.s32 p, ${last}, 0; {default}@p {self.text}}}"

    def constraints(self) -> str:
        # A text of several instructions may write a result before it has read all operands.
        output = "=&" if self.asm().startswith("{") else "="
        letters = [output + letter for letter in self.results] + list(self.operands)
        return ",".join([*letters, "~{memory}"] if self.effect else letters)


def emit_types(what: Any, *operands: object) -> Any:
    """An `emit` that only tells the types of the results: a letter stands for a register."""
    if not isinstance(what, Instruction):
        return what.body(emit_types, *operands)
    assert len(operands) == len(what.operands), what.text
    results = list(what.results)
    return None if not results else results[0] if len(results) == 1 else results


class Compiler:
    """An `emit` that writes the instruction into the function being compiled; registers are LLVM values."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self._builder = builder

    def __call__(self, what: Any, *operands: object) -> Any:
        if not isinstance(what, Instruction):
            return what.body(self, *operands)
        args = [self.value(operand, letter) for operand, letter in zip(operands, what.operands)]
        types = [LLVM_TYPES[letter] for letter in what.results]
        result = ir.VoidType() if not types else types[0] if len(types) == 1 else ir.LiteralStructType(types)
        asm_type = ir.FunctionType(result, [arg.type for arg in args])
        asm = ir.InlineAsm(asm_type, what.asm(), what.constraints(), side_effect=what.effect)
        out = self._builder.call(asm, args, attrs=("convergent",) if what.warp else ())
        if len(types) < 2:
            return out if types else None
        return [self._builder.extract_value(out, i) for i in range(len(types))]

    def value(self, operand: object, letter: str) -> ir.Value:
        """`operand`, a register or a Python number, as the type that `letter` names."""
        wanted = LLVM_TYPES[letter]
        if isinstance(operand, int | float):
            return ir.Constant(wanted, operand)
        assert isinstance(operand, ir.Value)
        if operand.type == wanted:
            return operand
        return self._builder.sext(operand, wanted) if letter == "l" else self._builder.trunc(operand, wanted)


def macro(body: Callable[..., Any]) -> Any:
    """Makes `body(emit, *arguments)` callable in kernels as `body(*arguments)`.

    An argument is a register, or a list of them where the kernel passes a tuple. The body returns nothing, a register,
    or a list of registers of one type, which the kernel sees as a tuple.
    """

    return _intrinsic(body, list(inspect.signature(body).parameters)[1:])


def _intrinsic(body: Callable[..., Any], parameters: list[str]) -> Any:
    def define(_context: object, *types: Any) -> Any:
        letters = [_letters(type_) for type_ in types]
        result = body(emit_types, *letters)
        out = _letter(result[0] if isinstance(result, list) else result)

        def codegen(_context: Any, builder: ir.IRBuilder, _signature: object, args: Any) -> Any:
            emit = Compiler(builder)
            values = body(emit, *[_registers(builder, arg) for arg in args])
            if values is None:
                return _context.get_dummy_value()
            if not isinstance(values, list):
                return emit.value(values, out)
            return cgutils.pack_array(builder, [emit.value(value, out) for value in values])

        # numba converts the arguments of a call to the types of the signature.
        return signature(*map(_numba_type, (result, *letters))), codegen

    # numba reads the names of the parameters, and does not accept *types in their place.
    positional = inspect.Parameter.POSITIONAL_ONLY
    signature_read = inspect.Signature([inspect.Parameter(name, positional) for name in ("context", *parameters)])
    vars(define)["__signature__"] = signature_read
    made = intrinsic(define)
    made.body = body
    return made


def inlined(python_function: Callable[..., Any]) -> Any:
    """Makes a part of a kernel from a Python function, whose body takes the place of each call."""
    return cuda.jit(device=True, inline="always")(python_function)


def instruction(text: str, results: str = "", operands: str = "", **properties: bool) -> Any:
    """Makes an `Instruction` that kernels call and macros emit; its `at` is for macros."""
    what = Instruction(text, results, operands, **properties)
    made = _intrinsic(lambda emit, *registers: emit(what, *registers), [f"operand{i}" for i in range(len(operands))])
    made.at = what.at
    return made


@intrinsic
def shared_memory(_context: object) -> Any:
    """The int32 address of the CTA's shared memory, 128-byte aligned; the launch gives its size."""

    def codegen(_context: object, builder: ir.IRBuilder, _signature: object, _args: object) -> ir.Value:
        array = ir.ArrayType(ir.IntType(8), 0)
        memory = cgutils.add_global_variable(builder.module, array, "shared_bytes", addrspace=3)
        memory.linkage = "external"
        memory.align = 128
        return builder.ptrtoint(memory, LLVM_TYPES["r"])

    return signature(nt.int32), codegen


def _letters(type_: Any) -> Any:
    if isinstance(type_, nt.UniTuple):
        return [_letters(type_.dtype)] * type_.count
    if isinstance(type_, nt.Float):
        return "f"
    return "l" if isinstance(type_, nt.Integer) and type_.bitwidth == 64 else "r"


def _letter(value: object) -> str:
    if isinstance(value, str):
        return value
    return "f" if isinstance(value, float) else "r"


def _numba_type(value: Any) -> Any:
    """The type of an argument or result of a macro: nothing, a letter or a number, or a list of letters and numbers."""
    if isinstance(value, list):
        return nt.UniTuple(_numba_type(value[0]), len(value))
    return nt.none if value is None else NUMBA_TYPES[_letter(value)]


def _registers(builder: ir.IRBuilder, arg: ir.Value) -> Any:
    is_tuple = isinstance(arg.type, ir.ArrayType)
    return [builder.extract_value(arg, i) for i in range(arg.type.count)] if is_tuple else arg
