"""Workers that fail or are killed in any state, parents that are killed or interrupted: everybody gets an answer, and
no process, shared memory or temporary file is left behind. Real processes throughout."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path

import psutil
import pytest
from model_zoo import make_tiny_model

from nanopd import (
    LLM,
    NanopdError,
    RequestHandle,
    RequestOutput,
    RequestOutputDelta,
    Route,
    SamplingParams,
    WorkerError,
)
from nanopd.core.sequence import Sequence, SequenceStatus
from nanopd.engine.engine import Engine
from nanopd.workers import process as worker_process

ROOT = Path(__file__).parents[1]
WAIT_S = 30.0
MIXED, PREFILL, DECODE = ({"device": "cpu", "role": role} for role in ("mixed", "prefill", "decode"))
PROMPT = list(range(100, 180))
GREEDY = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
SEEDED = SamplingParams(temperature=1, seed=5, max_tokens=60, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), "llama")


def make_llm(model: Path, *workers: dict, **keys) -> LLM:
    policy = "disaggregated" if PREFILL in workers else "round_robin"
    defaults = {"num_blocks": 100, "max_num_seqs": 8, "max_restarts": 0}
    return LLM(str(model), workers=list(workers), policy=policy, **{**defaults, **keys})


def worker_processes(parent: psutil.Process | None = None) -> list[psutil.Process]:
    """In the order of their start, which is that of the configuration."""
    found = [child for child in (parent or psutil.Process()).children() if is_worker(child)]
    return sorted(found, key=lambda child: (child.create_time(), child.pid))


def is_worker(process: psutil.Process) -> bool:
    try:
        return "spawn_main" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # it has ended meanwhile
        return False


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = WAIT_S) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"waited for {what} in vain"
        time.sleep(0.002)


def footprint() -> tuple[set[str], set[str]]:
    return set(os.listdir("/dev/shm")), set(os.listdir(tempfile.gettempdir()))


def open_files() -> Counter[str]:
    """What the descriptors of this process stand for, with their numbers left out."""
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    names = [os.readlink(link).partition(":[")[0] for link in links if os.path.lexists(link)]
    return Counter(name for name in names if not name.startswith("/proc/"))


@contextmanager
def nothing_left_behind() -> Iterator[None]:
    resource_tracker.ensure_running()  # multiprocessing's helper lives as long as this process
    files, fds = footprint(), open_files()
    yield
    gc.collect()
    assert worker_processes() == []
    assert footprint()[0] <= files[0]
    assert not {name for name in footprint()[1] - files[1] if name.startswith(("pymp", "torch", "nanopd"))}
    assert open_files() <= fds


# --------------------------------------------------------------------------------------------------- killed workers


def wait_for_state(llm: LLM, request_id: str, state: Callable[[Engine, Sequence], bool]) -> None:
    def is_there(engine: Engine) -> bool:
        seq = engine.seqs.get(request_id)
        return seq is not None and state(engine, seq)

    wait_until(lambda: llm._thread.call(is_there), f"the state of {request_id}")


def is_prefilling(_: Engine, seq: Sequence) -> bool:
    return seq.status is SequenceStatus.PREFILL


def is_moving(engine: Engine, seq: Sequence) -> bool:
    return seq.status is SequenceStatus.MOVING and engine.handovers.has_plans_out


def is_decoding(_: Engine, seq: Sequence) -> bool:
    return seq.status is SequenceStatus.RUNNING


# name -> route, the worker that is held to keep the request in the state, the worker that is killed in it
KILLS = {
    "in prefill": (is_prefilling, Route(0, 0), 0, 0),
    "the source of a transfer": (is_moving, Route(0, 1), 1, 0),
    "the destination of a transfer": (is_moving, Route(0, 1), 1, 1),
    "in decode": (is_decoding, Route(0, 0), 0, 0),
}


def catch(llm: LLM, processes: list[psutil.Process], kill: str) -> tuple[RequestHandle, list[RequestOutputDelta]]:
    """A request that stays in the state, as a worker is held; and what has been streamed of it."""
    state, route, held, _ = KILLS[kill]
    if state is not is_decoding:
        processes[held].suspend()
    handle = llm.submit(PROMPT, SEEDED, stream=True, request_id="victim", route=route)
    streamed = [next(iter(handle)) for _ in range(5)] if state is is_decoding else []
    processes[held].suspend()
    wait_for_state(llm, "victim", state)
    return handle, streamed


def end(handle: RequestHandle, streamed: list[RequestOutputDelta]) -> RequestOutput:
    """The result, which is what was streamed."""
    streamed += handle
    result = handle.result(WAIT_S)
    assert [token for delta in streamed for token in delta.token_ids] == result.outputs[0].token_ids
    assert (streamed[-1].error, streamed[-1].finish_reason) == (result.error, result.outputs[0].finish_reason)
    return result


@pytest.mark.parametrize("kill", KILLS)
def test_killed_worker(model: Path, kill: str) -> None:
    """With a worker left its requests go on there; without one they end with an error that says why."""
    _, _, held, killed = KILLS[kill]
    keys = {"max_num_batched_tokens": 16, "enable_prefix_caching": False}  # the victim's prompt takes several steps
    with nothing_left_behind(), make_llm(model, MIXED, MIXED, **keys) as llm:
        processes = worker_processes()
        expected = llm.generate([PROMPT] * 4, SEEDED, use_tqdm=False)
        victim, streamed = catch(llm, processes, kill)
        others = [llm.submit(PROMPT[n:], GREEDY) for n in range(4)]  # one for each route
        processes[killed].kill()
        if held != killed:
            processes[held].resume()
        result = end(victim, streamed)
        assert result.outputs[0].token_ids == expected[0].outputs[0].token_ids
        assert (result.outputs[0].finish_reason, result.error) == ("length", None)
        assert [other.result(WAIT_S).outputs[0].finish_reason for other in others] == ["length"] * 4

        survivor = 1 - killed
        processes[survivor].suspend()
        last = [llm.submit(PROMPT, GREEDY) for _ in range(3)]
        processes[survivor].kill()
        for handle in last:
            assert handle.result(WAIT_S).outputs[0].finish_reason == "error"
            assert "no route is left" in handle.result().error
            assert "worker 1: was killed by SIGKILL" in handle.result().error
        assert llm.submit(PROMPT, GREEDY).result(WAIT_S).error == last[0].result().error
        del llm, victim, others, last, handle


@pytest.mark.parametrize("kill", [kill for kill in KILLS if "transfer" in kill])
def test_killed_in_transfer_without_another_route(model: Path, kill: str) -> None:
    with nothing_left_behind(), make_llm(model, PREFILL, DECODE) as llm:
        killed = KILLS[kill][3]
        processes = worker_processes()
        victim, streamed = catch(llm, processes, kill)
        processes[killed].kill()
        result = end(victim, streamed)
        assert len(result.outputs[0].token_ids) == 1  # from the prefill
        assert result.outputs[0].finish_reason == "error"
        assert f"worker {killed}: was killed by SIGKILL" in result.error
        processes[1].resume() if killed == 0 else None
        del llm, victim


def test_worker_that_raises(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its traceback reaches the caller; the engine does not spin, and goes on to answer."""
    monkeypatch.setattr(worker_process, "WORKER_ENTRY", "failing_worker")
    with make_llm(model, MIXED) as llm:
        llm.submit(PROMPT, GREEDY).result(WAIT_S)
        error = llm.submit([5, 13, 5], GREEDY).result(WAIT_S).error
        assert "ValueError: an unlucky token" in error
        assert "failing_worker.py" in error
        before = psutil.Process().cpu_times()
        time.sleep(0.5)
        after = psutil.Process().cpu_times()
        assert after.user + after.system - before.user - before.system < 0.25
        assert llm.submit(PROMPT, GREEDY).result(WAIT_S).outputs[0].finish_reason == "error"


# ------------------------------------------------------------------------------------------------- replaced workers


def new_process(known: list[psutil.Process]) -> psutil.Process:
    wait_until(lambda: set(worker_processes()) - set(known), "a new worker process")
    [process] = set(worker_processes()) - set(known)
    return process


def is_idle(engine: Engine) -> bool:
    return not engine.has_unfinished


def wait_for_return(llm: LLM, worker: int, generation: int) -> None:
    def has_returned(engine: Engine) -> bool:
        scheduler = engine.schedulers[worker]
        return scheduler.generation == generation and not scheduler.is_dead

    wait_until(lambda: llm._thread.call(has_returned), f"the return of worker {worker}")


def test_killed_worker_is_replaced_while_the_others_serve(model: Path) -> None:
    """Killed under load, and its replacement while it loads; the one after that serves."""
    routes = [Route(p, d) for p in (0, 1) for d in (0, 1)]
    with nothing_left_behind(), make_llm(model, MIXED, MIXED, num_blocks=200, max_restarts=2) as llm:
        processes = worker_processes()
        expected = llm.generate([PROMPT], GREEDY, use_tqdm=False)[0].outputs[0].token_ids
        loaded = [llm.submit(PROMPT, GREEDY, route=routes[n % 4]) for n in range(12)]
        victim = llm.submit(PROMPT, ENDLESS, stream=True, route=Route(0, 0))
        other = llm.submit(PROMPT, ENDLESS, stream=True, route=Route(1, 1))
        assert next(iter(victim)).token_ids == next(iter(other)).token_ids == expected[:1]
        processes[0].kill()
        new_process(processes).kill()
        for handle in loaded:
            assert handle.result(WAIT_S).outputs[0].token_ids == expected
        results = [handle.result(WAIT_S) for handle in (victim, other)]
        assert results[0].outputs[0].token_ids == results[1].outputs[0].token_ids
        assert [result.metrics.num_preemptions for result in results] == [1, 0]

        wait_for_return(llm, 0, generation=2)
        stats = llm.stats(reset=True)
        assert stats.num_restarts == [2, 0]
        assert all(busy_s > 0 for busy_s in stats.busy_s)
        assert llm.stats().busy_s == [0, 0]
        results = [llm.submit(PROMPT, GREEDY, route=route).result(WAIT_S) for route in routes]
        assert [(r.route, r.outputs[0].token_ids) for r in results] == [(route, expected) for route in routes]
        moved = llm.submit(PROMPT, ENDLESS, stream=True, request_id="moved", route=Route(1, 1))
        next(iter(moved))
        llm._thread.call(lambda engine: engine.move("moved", 0))
        assert moved.result(WAIT_S).outputs[0].token_ids == other.result().outputs[0].token_ids
        assert moved.result().route == Route(1, 0)
        wait_until(partial(llm._thread.call, is_idle), "the last steps in flight")
        assert [blocks.used for blocks in llm.stats().blocks] == [0, 0]
        del llm, victim, other, loaded, handle, moved


def test_hung_worker_is_replaced(model: Path) -> None:
    with nothing_left_behind(), make_llm(model, MIXED, max_restarts=1, step_timeout_s=2.0) as llm:
        expected = llm.generate([PROMPT], GREEDY, use_tqdm=False)[0].outputs[0].token_ids
        processes = worker_processes()
        processes[0].suspend()
        waiting = [llm.submit(PROMPT, GREEDY), llm.submit(PROMPT, GREEDY, deadline_s=0.5)]
        assert waiting[1].result(WAIT_S).error == "the deadline has passed"
        assert waiting[0].result(WAIT_S).outputs[0].token_ids == expected
        assert worker_processes() != processes
        new_process(processes).kill()  # the last one it gets
        error = llm.submit(PROMPT, GREEDY).result(WAIT_S).error
        assert error == "no route is left: worker 0: was killed by SIGKILL"
        del llm, waiting


def test_request_that_kills_every_worker(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is replayed twice, then it ends with the traceback; the others are served in the end."""
    monkeypatch.setattr(worker_process, "WORKER_ENTRY", "failing_worker")
    with make_llm(model, MIXED, MIXED, max_restarts=2) as llm:
        [expected] = llm.generate([PROMPT], GREEDY, use_tqdm=False)
        poison = llm.submit([5, 13, 5], GREEDY)
        error = poison.result(WAIT_S).error
        assert error.startswith("3 workers died while they computed it; the last: worker ")
        assert "ValueError: an unlucky token" in error
        assert poison.result().metrics.num_preemptions == 3
        assert llm.submit(PROMPT, GREEDY).result(WAIT_S).outputs[0].token_ids == expected.outputs[0].token_ids
        assert sum(llm.stats().num_restarts) == 3


# ---------------------------------------------------------------------------------------------------------- loading


def test_worker_that_fails_to_load(model: Path, tmp_path: Path) -> None:
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: 1000 if file.suffix == ".safetensors" else None])
    with nothing_left_behind():
        with pytest.raises(WorkerError, match="Traceback") as failure:
            make_llm(tmp_path, MIXED, MIXED)
        assert "load_model" in failure.value.traceback
        del failure


def test_worker_killed_while_loading(model: Path) -> None:
    def kill_first() -> None:
        wait_until(worker_processes, "a worker")
        worker_processes()[0].kill()

    with nothing_left_behind():
        threading.Thread(target=kill_first).start()
        with pytest.raises(WorkerError, match="worker 0: was killed by SIGKILL while loading"):
            make_llm(model, MIXED, MIXED)


def test_worker_that_loads_too_long(model: Path) -> None:
    with nothing_left_behind(), pytest.raises(WorkerError, match="start_timeout_s"):
        make_llm(model, MIXED, start_timeout_s=0.01)


# ----------------------------------------------------------------------------------------- the engine and its thread


def test_shutdown_answers_everybody(model: Path) -> None:
    with nothing_left_behind():
        llm = make_llm(model, MIXED)
        stream = llm.stream(PROMPT, ENDLESS)
        waiting = [llm.submit(PROMPT, ENDLESS) for _ in range(20)]
        next(stream)
        timer = threading.Timer(0.05, llm.shutdown)
        timer.start()
        last = list(stream)[-1]
        assert (last.finish_reason, last.error) == ("error", "the engine was shut down")
        for handle in waiting:
            with pytest.raises(NanopdError, match="the engine was shut down"):
                handle.result(WAIT_S)
        for use, args in ((llm.submit, (PROMPT,)), (llm.stats, ()), (llm.generate, ([PROMPT],))):
            with pytest.raises(NanopdError, match="the engine was shut down"):
                use(*args)
        llm.abort("request-0")
        llm.shutdown()
        timer.join()
        wait_until(lambda: not worker_processes(), "the end of the worker")
        del llm, waiting, stream, handle, use, timer


def test_engine_that_fails(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in the engine's own thread: all callers are answered, later ones are refused, with the cause."""

    def step(_: Engine) -> list:
        raise ZeroDivisionError("a bug")

    with make_llm(model, MIXED) as llm:
        handles = [llm.submit(PROMPT, ENDLESS) for _ in range(3)]
        monkeypatch.setattr(Engine, "step", step)
        for handle in handles:
            with pytest.raises(NanopdError, match="a bug") as failure:
                handle.result(WAIT_S)
            assert isinstance(failure.value.__cause__.__cause__, ZeroDivisionError)
        with pytest.raises(NanopdError, match="a bug") as failure:
            llm.submit(PROMPT)
        assert failure.value.__cause__.__traceback__ is not None
        wait_until(lambda: not worker_processes(), "the end of the worker")


# ----------------------------------------------------------------------------------------------- the parent process

SCRIPT = """
import sys
from nanopd import LLM, SamplingParams
{guard}
    llm = LLM(sys.argv[1], workers=[{{"device": "cpu"}}] * 2, num_blocks=100, max_num_seqs=8)
    print("serving", flush=True)
    while True:
        llm.generate([[5, 6, 7]] * 4, SamplingParams(max_tokens=400, ignore_eos=True), use_tqdm=False)
"""


def start_script(tmp_path: Path, model: Path, guard: str = 'if __name__ == "__main__":') -> subprocess.Popen[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(guard=guard))
    return subprocess.Popen(
        [sys.executable, str(script), str(model)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("state", ["loading", "serving"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=lambda s: s.name)
def test_end_of_the_parent(model: Path, tmp_path: Path, how: signal.Signals, state: str) -> None:
    """kill -9, and Ctrl-C, which goes to the whole process group."""
    shm, temp = footprint()
    script = start_script(tmp_path, model)
    parent = psutil.Process(script.pid)
    try:
        wait_until(lambda: len(worker_processes(parent)) == 2, "the workers")
        if state == "serving":
            assert script.stdout.readline() == "serving\n"
        family = parent.children(recursive=True)
        parent.kill() if how is signal.SIGKILL else os.killpg(script.pid, how)
        _, stderr = script.communicate(timeout=20)
        _, alive = psutil.wait_procs(family, timeout=10)
    finally:
        script.kill()
    assert alive == []
    assert footprint()[0] <= shm
    assert not {name for name in footprint()[1] - temp if name.startswith(("pymp", "torch", "nanopd"))}
    assert script.returncode == -how
    if how is signal.SIGINT:  # the parent's own, and nothing of the workers
        assert stderr.count("Traceback") == stderr.count("\nKeyboardInterrupt") == 1


def test_script_without_main_guard(model: Path, tmp_path: Path) -> None:
    script = start_script(tmp_path, model, guard="if True:")
    _, stderr = script.communicate(timeout=WAIT_S)
    assert script.returncode == 1
    assert "a worker imports this script" in stderr
    assert "WorkerError: worker" in stderr.splitlines()[-1]
    assert '__name__ == "__main__"' in stderr.splitlines()[-1]
