"""Every variant compiled and assembled for Ada and Hopper, without a GPU: what the code must have and must not."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("numba_cuda", reason="the kernels are written with numba-cuda")

from nanopd.cuda import adjusting, attention, blocks, elementwise, launch, sampling, warp
from nanopd.cuda.attention import decode_kernel, plan_spec
from nanopd.cuda.blocks import move_spec
from nanopd.cuda.launch import Spec, assemble, compile_to_ptx, load_or_compile
from nanopd.cuda.linear import skinny_spec

SHARED_LIMITS = {(8, 9): 99 * 1024, (9, 0): 227 * 1024}
# what moves the data: bytes per access, in the instruction's own words
WIDE_ACCESS = {
    "decode_kernel": "cp.async.cg.shared.global",
    "skinny_kernel": "ld.global.nc.L1::no_allocate.L2::128B.v4.b32",
    "norm_kernel": "ld.global.v4.b32",
    "silu_kernel": "ld.global.v4.b32",
    "move_kernel": "ld.global.v4.b32",
}


def all_variants(shared_limit: int) -> list[Spec]:
    """For a device whose CTAs may have `shared_limit` bytes of shared memory."""
    specs = [blocks.move_spec(), attention.plan_spec()]
    for dtype in warp.NAMES_OF_LOGITS.values():
        specs += [sampling.sampling_spec(dtype), adjusting.adjusting_spec(dtype)]
    for dtype in warp.NAMES.values():
        specs += [attention.decode_spec(head_dim, dtype, shared_limit) for head_dim in attention.HEAD_DIMS]
        specs += [elementwise.rotary_spec(head_dim, dtype) for head_dim in elementwise.HEAD_DIMS]
        specs += [elementwise.norm_spec(dtype), elementwise.silu_spec(dtype)]
        specs += [skinny_spec(dtype, x_tiles, shared_limit) for x_tiles in (1, 2)]
    return specs


CASES = [(capability, spec) for capability, limit in SHARED_LIMITS.items() for spec in all_variants(limit)]
# The first variant of each kernel, for Hopper, is compiled by a plain `pytest`, all others in the slow tier.
FIRST = {spec.factory.__name__: ((9, 0), spec) for spec in reversed(all_variants(SHARED_LIMITS[9, 0]))}


def case(capability: tuple[int, int], spec: Spec) -> object:
    marks = () if (capability, spec) in FIRST.values() else pytest.mark.slow
    return pytest.param(capability, spec, marks=marks, id=f"sm_{capability[0]}{capability[1]}-{spec.name}")


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> None:
    pathfinder = pytest.importorskip("cuda.pathfinder")
    for name in ("nvvm", "nvrtc", "nvJitLink"):
        try:
            pathfinder.load_nvidia_dynamic_lib(name)
        except pathfinder.DynamicLibNotFoundError:
            pytest.skip(f"lib{name} is not installed: pip packages nvidia-nvvm, nvidia-cuda-nvrtc, nvidia-nvjitlink")


def test_variants_are_few() -> None:
    for limit in SHARED_LIMITS.values():
        specs = all_variants(limit)
        assert len(set(specs)) == len(specs) <= 24


@pytest.mark.parametrize(("capability", "spec"), [case(*pair) for pair in CASES])
def test_variant(capability: tuple[int, int], spec: Spec) -> None:
    ptx = compile_to_ptx(spec, capability)
    assert ".f64" not in ptx, "a Python float is a double"
    assert ".local" not in ptx, "an array in local memory"
    assert "call" not in ptx, "everything is inlined"
    assert WIDE_ACCESS.get(spec.factory.__name__, "") in ptx
    if spec.factory is decode_kernel:
        assert set(re.findall(r"cp\.async\.cg\S* \[\S+\], \[\S+\], (\d+)", ptx)) == {"16"}
    assert ("griddepcontrol.wait" in ptx) == (capability >= (9, 0))
    _, log = assemble(ptx, capability)
    assert " 0 bytes spill stores, 0 bytes spill loads" in log
    registers = int(re.findall(r"Used (\d+) registers", log)[0])
    assert registers * spec.threads <= 65536
    assert spec.shared_bytes <= SHARED_LIMITS[capability]


def test_the_first_weights_are_loaded_before_the_wait() -> None:
    """A skinny product that overlaps its predecessor has its weights under way; ptxas would not keep this order
    within one basic block."""
    spec = next(spec for spec in all_variants(SHARED_LIMITS[9, 0]) if spec.factory.__name__ == "skinny_kernel")
    before, _ = compile_to_ptx(spec, (9, 0)).split("griddepcontrol.wait")
    assert before.count("ld.global.nc") == 16
    assert re.search(r"bra\s+\S+;\s*$", re.sub(r"//.*", "", before)), "a branch between the loads and the wait"


def test_cubins_are_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cubin = load_or_compile(plan_spec(), (9, 0), tmp_path)
    assert cubin.startswith(b"\x7fELF")
    monkeypatch.setattr(launch, "compile_to_ptx", None)  # not needed again
    assert load_or_compile(plan_spec(), (9, 0), tmp_path) == cubin
    assert len(list(tmp_path.iterdir())) == 1


def test_the_key_of_a_cubin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another variant, device, option, or an edit in any file of the package makes another key."""
    key = launch._fingerprint
    others = [
        key(plan_spec(), (8, 9)),
        key(plan_spec(8), (9, 0)),
        key(move_spec(), (9, 0)),
        key(Spec(plan_spec().factory, plan_spec().parameters, plan_spec().arguments, 64), (9, 0)),
    ]
    for file in Path(launch.__file__).parent.glob("*.py"):
        shutil.copy(file, tmp_path)
    (tmp_path / "warp.py").write_text((tmp_path / "warp.py").read_text() + "\n")
    with monkeypatch.context() as patch:
        patch.setattr(launch, "_sources", launch._sources.__wrapped__)
        patch.setattr(launch, "__file__", str(tmp_path / "launch.py"))
        others.append(key(plan_spec(), (9, 0)))
    assert len({key(plan_spec(), (9, 0)), *others}) == 6
