"""Runs kernels of `nanopd.cuda` without a GPU: their own Python, 32 lanes per numpy operation, a thread per warp.

Instructions are modelled after the PTX manual. What a GPU would let pass is an error here: branches that lanes take
differently, misaligned or foreign addresses. Memory that nobody wrote is NaN, and asynchronous copies arrive only when
they are waited for. CTAs run one after the other, so races between CTAs go unseen.
"""

from __future__ import annotations

import functools
import re
import threading
import types
from collections.abc import Callable
from typing import Any

import numpy as np

from nanopd.cuda.launch import Spec
from nanopd.cuda.ptx import Instruction, shared_memory

LANE = np.arange(32)
G, T = LANE >> 2, LANE & 3
POISON = 0xFF  # NaN in every floating-point type
GLOBAL_BASE, SHARED_BASE = 4096, 1024  # so that an address that was never set is out of bounds


class Lanes(np.ndarray):
    """A value per lane, int64 or float32. A branch on it demands that all lanes agree."""

    def __bool__(self) -> bool:
        return bool(self._uniform())

    def __index__(self) -> int:
        return int(self._uniform())

    def _uniform(self) -> Any:
        values = np.asarray(self).reshape(-1)
        assert (values == values[0]).all(), f"lanes branch differently: {values}"
        return values[0]


def lanes(value: Any, dtype: type = np.int64) -> Lanes:
    return np.broadcast_to(np.asarray(value, dtype), (32,)).copy().view(Lanes)


def words_of(values: Any) -> np.ndarray:
    """The 32 bits of each lane's int or float."""
    array = np.broadcast_to(np.asarray(values), (32,))
    return (
        array.astype(np.float32).view(np.uint32)
        if array.dtype.kind == "f"
        else array.astype(np.int64).astype(np.uint32)
    )


def ints(words: Any) -> Lanes:
    return lanes(np.ascontiguousarray(words, np.uint32).view(np.int32))


def floats(words: Any) -> Lanes:
    return lanes(np.ascontiguousarray(words, np.uint32).view(np.float32), np.float32)


def bf16_bits(x: Any) -> np.ndarray:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def bf16_values(bits: Any) -> np.ndarray:
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def to_bits(x: Any, dtype: str) -> np.ndarray:
    return bf16_bits(x) if dtype == "bf16" else np.asarray(x, np.float32).astype(np.float16).view(np.uint16)


def to_values(bits: Any, dtype: str) -> np.ndarray:
    return bf16_values(bits) if dtype == "bf16" else np.asarray(bits, np.uint16).view(np.float16).astype(np.float32)


def halves(register: Any, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The two elements of each lane's register, as float32."""
    words = words_of(register)
    return to_values((words & 0xFFFF).astype(np.uint16), dtype), to_values((words >> 16).astype(np.uint16), dtype)


class Memory:
    """Bytes from `base` on."""

    def __init__(self, base: int, size: int) -> None:
        self.bytes = np.full(size, POISON, np.uint8)
        self.base = base

    def load(self, address: Any, words: int) -> np.ndarray:
        """[32, words]"""
        return self.bytes.view(np.uint32)[self._index(address, words)[:, None] + np.arange(words)]

    def store(self, address: Any, values: list[Any], mask: np.ndarray) -> None:
        index = self._index(np.where(mask, address, self.base), len(values))
        for i, value in enumerate(values):
            self.bytes.view(np.uint32)[index[mask] + i] = words_of(value)[mask]

    def add_i64(self, address: Any, amounts: np.ndarray, mask: np.ndarray) -> None:
        index = self._index(np.where(mask, address, self.base), 2) // 2
        np.add.at(self.bytes.view(np.int64), index[mask], amounts[mask])

    def _index(self, address: Any, words: int) -> np.ndarray:
        offset = np.broadcast_to(np.asarray(address, np.int64), (32,)) - self.base
        assert (offset % (4 * words) == 0).all(), f"misaligned for {words} words: {offset}"
        assert (offset >= 0).all() and (offset + 4 * words <= len(self.bytes)).all(), f"out of bounds: {offset}"
        return offset // 4


class Cta:
    """What the warps of a CTA share."""

    def __init__(self, index: int, num_ctas: int, num_warps: int, shared_bytes: int, memory: Memory) -> None:
        self.index, self.num_ctas, self.memory = index, num_ctas, memory
        self.shared = Memory(SHARED_BASE, shared_bytes)
        self.barrier = threading.Barrier(num_warps)
        self.votes: dict[int, bool] = {}
        self.atomic = threading.Lock()


class Warp:
    """An `emit` for macros that computes at once; `bind` gives a kernel's functions their emulated meaning."""

    def __init__(self, cta: Cta, index: int) -> None:
        self._cta, self._index = cta, index
        self._copies: list[tuple[Any, np.ndarray]] = []  # since the last commit
        self._groups: list[list[tuple[Any, np.ndarray]]] = []

    def __call__(self, instruction: Any, *operands: Any) -> Any:
        if not isinstance(instruction, Instruction):
            return instruction.body(self, *operands)
        assert len(operands) == len(instruction.operands), instruction.text
        mask = np.ones(32, bool)
        if instruction.predicated:
            *operands, predicate = operands  # type: ignore[assignment]
            mask = np.broadcast_to(np.asarray(predicate) != 0, (32,))
        offset = re.search(r"\+(\d+)\]", instruction.text)
        if offset:  # of the first address
            operands = (np.asarray(operands[0]) + int(offset[1]), *operands[1:])
        kinds = instruction.operands
        values = [lanes(x, np.float32 if kind == "f" else np.int64) for x, kind in zip(operands, kinds)]
        emulate, found = _rule(instruction.text)
        return emulate(self, found, instruction, mask, *values)

    def bind(self, item: Any) -> Any:
        """`item`, a global or a closure variable of a kernel, for this warp."""
        if item is shared_memory:
            return lambda: lanes(SHARED_BASE)
        if hasattr(item, "body"):  # a macro or an instruction
            return lambda *args: _as_tuple(item.body(self, *args))
        if hasattr(item, "py_func"):  # an inlined function
            return self.bind(item.py_func)
        if isinstance(item, types.FunctionType):
            return self._bind_function(item)
        if isinstance(item, types.ModuleType):
            return _Namespace(self, item)
        if str(item) in ("int32", "int64"):
            return lanes
        if str(item) == "float32":
            return lambda x: lanes(x, np.float32)
        return item

    def _bind_function(self, function: types.FunctionType) -> Callable[..., Any]:
        names = function.__code__.co_names
        scope = {name: self.bind(function.__globals__[name]) for name in names if name in function.__globals__}
        closure = tuple(types.CellType(self.bind(cell.cell_contents)) for cell in function.__closure__ or ())
        return types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, closure)

    # ---- what instructions do; every method has the arguments (match, instruction, mask, *operands)

    def where(self, found: re.Match[str], *_: Any) -> Lanes:
        values = {"tid": 32 * self._index + LANE, "ctaid": self._cta.index, "nctaid": self._cta.num_ctas}
        return lanes(values[found[1]])

    def load(self, found: re.Match[str], instruction: Instruction, _mask: np.ndarray, address: Any) -> Any:
        memory = self._cta.shared if found[1] == "shared" else self._cta.memory
        if instruction.results == "l":
            return lanes(np.ascontiguousarray(memory.load(address, 2)).view(np.int64)[:, 0])
        words = memory.load(address, len(instruction.results))
        convert = floats if instruction.results[0] == "f" else ints
        return _one_or_list([convert(words[:, i]) for i in range(words.shape[1])])

    def store(self, found: re.Match[str], what: Instruction, mask: np.ndarray, address: Any, *values: Any) -> None:
        memory = self._cta.shared if found[1] == "shared" else self._cta.memory
        if what.operands[1] == "l":
            values = values[0], values[0] >> 32
        memory.store(address, list(values), mask)

    def add_i64(self, _found: Any, _: Instruction, _mask: np.ndarray, address: Any, amount: Any, vote: Any) -> None:
        with self._cta.atomic:
            self._cta.shared.add_i64(address, np.asarray(amount), np.asarray(vote) != 0)

    def reinterpret(self, _found: Any, instruction: Instruction, _mask: np.ndarray, x: Any) -> Lanes:
        return ints(words_of(x)) if instruction.results == "r" else floats(words_of(x))

    def count(self, _found: Any, _: Instruction, mask: np.ndarray, address: Any) -> Lanes:
        assert mask.sum() <= 1
        before = self._cta.memory.load(np.where(mask, address, self._cta.memory.base), 1)[:, 0]
        self._cta.memory.store(address, [before + 1], mask)
        return lanes(np.where(mask, before.astype(np.int64), -1))

    def copy(self, _found: Any, _: Instruction, _mask: np.ndarray, to: Any, address: Any) -> None:
        self._copies.append((to, self._cta.memory.load(address, 4)))

    def commit(self, *_: Any) -> None:
        self._groups.append(self._copies)
        self._copies = []

    def wait(self, found: re.Match[str], *_: Any) -> None:
        newer = int(found[1])
        done, self._groups = self._groups[: len(self._groups) - newer], self._groups[len(self._groups) - newer :]
        for to, words in (copy for group in done for copy in group):
            self._cta.shared.store(to, list(words.T), np.ones(32, bool))

    def sync(self, *_: Any) -> None:
        self._cta.barrier.wait()

    def any_of_cta(self, _found: Any, _: Instruction, _mask: np.ndarray, vote: Any) -> Lanes:
        self._cta.votes[self._index] = bool((np.asarray(vote) != 0).any())
        self.sync()
        result = any(self._cta.votes.values())
        self.sync()
        return lanes(int(result))

    def mma(self, found: re.Match[str], _: Instruction, _mask: np.ndarray, *operands: Any) -> list[Lanes]:
        a, b, c = np.zeros((16, 16), np.float32), np.zeros((16, 8), np.float32), np.zeros((16, 8), np.float32)
        for register, (row, col) in zip(operands[:4], ((G, 2 * T), (G + 8, 2 * T), (G, 2 * T + 8), (G + 8, 2 * T + 8))):
            a[row, col], a[row, col + 1] = halves(register, found[1])
        for register, row in zip(operands[4:6], (2 * T, 2 * T + 8)):
            b[row, G], b[row + 1, G] = halves(register, found[1])
        places = ((G, 2 * T), (G, 2 * T + 1), (G + 8, 2 * T), (G + 8, 2 * T + 1))
        for value, place in zip(operands[6:], places):
            c[place] = value
        c += a @ b
        return [lanes(c[place], np.float32) for place in places]

    def transpose(self, _found: Any, _: Instruction, _mask: np.ndarray, x: Any) -> Lanes:
        matrix, words = np.zeros((8, 8), np.uint32), words_of(x)
        matrix[G, 2 * T], matrix[G, 2 * T + 1] = words & 0xFFFF, words >> 16
        return ints(matrix.T[G, 2 * T] | (matrix.T[G, 2 * T + 1] << 16))

    def permute(self, found: re.Match[str], _: Instruction, _mask: np.ndarray, x: Any, y: Any) -> Lanes:
        x, y = words_of(x), words_of(y)
        return ints((x & 0xFFFF) | (y << 16) if found[1] == "5410" else (x >> 16) | (y & 0xFFFF0000))

    def mul_pair(self, found: re.Match[str], _: Instruction, _mask: np.ndarray, x: Any, y: Any) -> Lanes:
        dtype = found[1] or found[2]
        low, high = (to_bits(a * b, dtype).astype(np.uint32) for a, b in zip(halves(x, dtype), halves(y, dtype)))
        return ints(low | high << 16)

    def pack(self, found: re.Match[str], _: Instruction, _mask: np.ndarray, low: Any, high: Any) -> Lanes:
        low, high = (to_bits(np.asarray(x), found[1]).astype(np.uint32) for x in (low, high))
        return ints(low | high << 16)


def _simple(compute: Callable[..., Any], dtype: type = np.int64) -> Callable[..., Any]:
    def emulate(_warp: Warp, _found: Any, _instruction: Instruction, _mask: np.ndarray, *operands: Any) -> Lanes:
        return lanes(compute(*[np.asarray(x) for x in operands]), dtype)

    return emulate


def _float(compute: Callable[..., Any]) -> Callable[..., Any]:
    return _simple(compute, np.float32)


def _unpack(dtype: str) -> Callable[..., Any]:
    return lambda _warp, _found, _instruction, _mask, x: [lanes(half, np.float32) for half in halves(x, dtype)]


def _float_of(bits: np.ndarray) -> np.ndarray:
    return bits.astype(np.int32).view(np.float32).astype(np.float64)


def _unsigned(x: np.ndarray) -> np.ndarray:
    return x.astype(np.int64).view(np.uint64)


def _nothing(*_: Any) -> None:
    pass


def _shuffled(x: np.ndarray, source: np.ndarray) -> np.ndarray:
    return x[source & 31]


# the first pattern that is found in an instruction's text says what it does
RULES: list[tuple[str, Callable[..., Any]]] = [
    (r"%(tid|ctaid|nctaid)\.x", Warp.where),
    (r"^cp\.async\.cg", Warp.copy),
    (r"^cp\.async\.commit_group", Warp.commit),
    (r"^cp\.async\.wait_group (\d+)", Warp.wait),
    (r"^ld\.(global|shared)", Warp.load),
    (r"^st\.(global|shared)", Warp.store),
    (r"atom\.shared\.add\.u32.*red\.shared\.add", Warp.add_i64),
    (r"^atom\.acq_rel\.gpu\.global\.add", Warp.count),
    (r"^bar\.sync 0", Warp.sync),
    (r"bar\.red\.or", Warp.any_of_cta),
    (r"^bar\.warp\.sync|^griddepcontrol", _nothing),
    (r"^mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(\w+)", Warp.mma),
    (r"^movmatrix", Warp.transpose),
    (r"^prmt.* 0x(5410|7632)", Warp.permute),
    (r"fma\.rn\.(bf16)x2 \$0, \$1, \$2, z|^mul\.rn\.(f16)x2", Warp.mul_pair),
    (r"^cvt\.rn\.(bf16|f16)x2", Warp.pack),
    (r"shl\.b32 \$0, \$2, 16", _unpack("bf16")),
    (r"mov\.b32 \{x, y\}", _unpack("f16")),
    (r"vote\.sync\.ballot", _simple(lambda x: (x != 0).sum())),
    (r"^shfl\.sync\.bfly", _float(lambda x, mask: _shuffled(x, LANE ^ mask))),
    (r"shfl\.sync\.idx", _simple(_shuffled)),
    (r"shfl\.sync\.up", _simple(lambda x, n: x + np.where(n <= LANE, _shuffled(x, LANE - n), 0))),
    (r"add\.u32 x, \$1, 1", _simple(lambda x, n, total: ((x + 1) * n - 1) // total)),
    (r"mul\.wide\.u32 a, \$1", _simple(lambda x, y, z: x * y // z)),
    (r"shr\.u64 y, y, x", _simple(lambda key, floor: np.where(key >= floor, 2.0**40 * _float_of(key), 0))),
    (r"^mul\.hi\.u64", _simple(lambda x, y: [int(a) * int(b) >> 64 for a, b in zip(_unsigned(x), _unsigned(y))])),
    (r"^slct\.b64\.s32", _simple(lambda a, b, c: np.where(c >= 0, a, b))),
    (r"^set\.lt\.u32", _simple(lambda x, y: -(words_of(x) < words_of(y)).astype(int))),
    (r"^set\.le\.s32\.s64", _simple(lambda x, y: -(x <= y).astype(int))),
    (r"^mov\.b32 \$0, \$1;", Warp.reinterpret),
    (r"^add\.s64", _simple(np.add)),
    (r"^sub\.s32", _simple(np.subtract)),
    (r"^shr\.u32", _simple(lambda x, n: words_of(x) >> n)),
    (r"^add\.s32", _simple(np.add)),
    (r"^min\.s32", _simple(np.minimum)),
    (r"^max\.s32", _simple(np.maximum)),
    (r"^xor\.b32", _simple(np.bitwise_xor)),
    (r"^div\.u32", _simple(np.floor_divide)),
    (r"^mad\.wide\.s32", _simple(lambda a, b, c: a + b * c)),
    (r"^mad\.lo\.s32", _simple(lambda a, b, c: a * b + c)),
    (r"^cvt\.s64\.s32", _simple(lambda x: x)),
    (r"^cvt\.rn\.f32\.s32", _float(lambda x: x)),
    (r"and\.b32 x, \$1, 0xffffff;", _float(lambda x: x & 0xFFFFFF)),
    (r"^add\.f32", _float(np.add)),
    (r"^sub\.f32", _float(np.subtract)),
    (r"^mul(\.rn)?\.f32", _float(np.multiply)),
    (r"^fma\.rn\.f32", _float(lambda a, b, c: a * b + c)),
    (r"^min\.f32", _float(np.fmin)),  # of a number and a NaN, the number
    (r"^max\.f32", _float(np.fmax)),
    (r"^ex2", _float(np.exp2)),
    (r"^lg2", _float(np.log2)),
    (r"^rsqrt", _float(lambda x: 1 / np.sqrt(x))),
    (r"^rcp", _float(np.reciprocal)),
    (r"^slct\.f32\.s32", _float(lambda a, b, c: np.where(c >= 0, a, b))),
]


@functools.cache
def _rule(text: str) -> tuple[Callable[..., Any], re.Match[str]]:
    for pattern, emulate in RULES:
        if found := re.search(pattern, text):
            return emulate, found
    raise NotImplementedError(text)


class _Namespace:
    """A module whose functions are bound to a warp."""

    def __init__(self, warp: Warp, module: types.ModuleType) -> None:
        self._warp, self._module = warp, module

    def __getattr__(self, name: str) -> Any:
        bound = self._warp.bind(getattr(self._module, name))
        setattr(self, name, bound)
        return bound


class Emulator:
    """A GPU's global memory, and kernels that run on it."""

    def __init__(self, num_bytes: int = 1 << 22) -> None:
        self._memory = Memory(GLOBAL_BASE, num_bytes)
        self._top = GLOBAL_BASE

    def put(self, array: np.ndarray) -> int:
        """Copies an array to fresh memory and returns its address."""
        array = np.ascontiguousarray(array)
        address = self._top
        self._top += -(-array.nbytes // 256) * 256
        assert self._top <= GLOBAL_BASE + len(self._memory.bytes), "more memory is needed"
        self._memory.bytes[address - GLOBAL_BASE :][: array.nbytes] = array.reshape(-1).view(np.uint8)
        return address

    def get(self, address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self._memory.bytes[address - GLOBAL_BASE :][:num_bytes].view(dtype).reshape(shape).copy()

    def launch(self, spec: Spec, num_ctas: int, *arguments: float) -> None:
        kernel = spec.factory(*spec.parameters)
        assert len(arguments) == len(spec.arguments), "as many arguments as the specification has"
        for index in range(num_ctas):
            num_warps = spec.threads // 32
            cta = Cta(index, num_ctas, num_warps, spec.shared_bytes, self._memory)
            errors: list[BaseException] = []
            threads = [
                threading.Thread(target=self._run, args=(Warp(cta, w), kernel, spec, arguments, cta, errors))
                for w in range(num_warps)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if errors:
                raise errors[0]

    @staticmethod
    def _run(
        warp: Warp, kernel: Any, spec: Spec, arguments: tuple[float, ...], cta: Cta, errors: list[BaseException]
    ) -> None:
        types_ = [np.float32 if letter == "f" else np.int64 for letter in spec.arguments]
        try:
            with np.errstate(all="ignore"):
                warp.bind(kernel)(*[lanes(x, dtype) for x, dtype in zip(arguments, types_)])
        except BaseException as error:
            errors.append(error)
            cta.barrier.abort()


def _as_tuple(value: Any) -> Any:
    if not isinstance(value, list):
        return value if value is None or isinstance(value, Lanes) else lanes(value, np.float32)
    return tuple(x if isinstance(x, Lanes) else lanes(x, np.float32) for x in value)


def _one_or_list(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values
