"""Faults on purpose: which are allowed to be written, when they happen, and to whom."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from controller import cli
from controller.faults import allowed_faults, arm_configured
from controller.plan import Deployment, ModelSource, ProcessPlan
from controller.status import ProcessReport, ProcessSpec
from pdserve.clock import VirtualClock, run_virtual
from pdserve.config import FaultConfig, load_config
from pdserve.contract.errors import ConfigError, StreamBroken
from pdserve.contract.ids import Incarnation
from pdserve.contract.messages import SessionReady
from pdserve.contract.ports import Call, MessageStream
from pdserve.contract.work import StepBatch
from pdserve.engine.fake_engine import FakeEngine
from pdserve.faults import Faults, FaultyEngine, FaultyRpc, InjectedFailure
from pdserve.rpc.memory_rpc import MemoryNetwork, MemoryRpc

NO_STEP = StepBatch(())


def fault(**fields: Any) -> FaultConfig:
    (made,) = load_config(None, {"faults": [{"process": "decode-0", **fields}]}).faults
    return made


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"at": "sent Reserve", "do": "kill"}, "faults.0.at is not valid: 'sent Reserve' is no event"),
        ({"at": "step", "do": "explode"}, "faults.0.do is not valid: it should be 'kill'"),
        ({"at": "step", "do": "cut"}, "allowed there are kill, freeze, delay, hang, fail"),
        ({"at": "sent Kv", "do": "corrupt"}, "do: corrupt cannot happen at 'sent Kv'"),
        ({"at": "received Ack", "do": "corrupt"}, "at must be 'received Segment' or 'received Kv'"),
        ({"at": "step", "do": "delay"}, "do: delay needs seconds"),
        ({"at": "step", "do": "kill", "seconds": 3}, "do: kill takes no seconds"),
        ({"at": "sent Ack", "do": "kill", "token": 3}, "token is for at: step"),
        ({"at": "step", "do": "kill", "stream": "Kv"}, "stream is for at: sent or received"),
        ({"at": "step", "do": "kill", "tokn": 3}, "faults.0.tokn is not a key: did you mean token?"),
        ({"at": "step", "do": "kill", "process": "worker"}, "faults.0.process is not valid"),
    ],
)
def test_what_cannot_happen_is_refused_by_name(fields: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=r"^configuration|^command line") as caught:
        fault(**fields)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_faults_without_permission_stop_the_start(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    setting = "faults=[{process: decode-0, at: step, do: kill}]"
    assert cli.main(["up", "--set", setting]) == 1
    complaint = capsys.readouterr().err
    assert "faults is set (1 of them would happen): start with --allow-faults" in complaint


def plan(allowed: bool, previous: ProcessReport | None = None, **fields: object) -> ProcessPlan:
    config = load_config(None, {"faults": [{"process": "decode", "do": "fail", "at": "step", **fields}]})
    deployment = Deployment(config, ModelSource("m", None, "m"), allowed)
    return ProcessPlan(ProcessSpec("decode-1", "decode", 1), deployment, 1, previous=previous)


def test_where_faults_are_not_allowed_there_is_nothing_to_arm() -> None:
    assert allowed_faults(plan(allowed=False)) is None
    arm_configured(None, plan(allowed=False))


@pytest.mark.parametrize(
    ("is_replacement", "in_replacements", "fails"),
    [(False, False, True), (True, False, False), (True, True, True)],
)
def test_configured_faults_are_for_the_first_process_of_a_place(
    is_replacement: bool, in_replacements: bool, fails: bool
) -> None:
    previous = ProcessReport(1, "node") if is_replacement else None
    of_process = plan(True, previous, in_replacements=in_replacements)
    faults = allowed_faults(of_process)
    assert faults is not None
    arm_configured(faults, of_process)
    assert bool(faults.due(lambda fault: fault.at == "step")) is fails


def test_it_happens_from_the_nth_event_on_and_is_counted() -> None:
    faults, registry = Faults(), CollectorRegistry()
    faults.export(registry)
    faults.arm(fault(at="step", do="fail", nth=2, count=2))
    engine = FaultyEngine(FakeEngine(8), faults)
    engine.step(NO_STEP)
    for _ in range(2):
        with pytest.raises(InjectedFailure):
            engine.step(NO_STEP)
    engine.step(NO_STEP)
    assert registry.get_sample_value("pdserve_faults_total", {"action": "fail"}) == 2


async def test_a_hung_engine_leaves_the_event_loop_alone() -> None:
    faults = Faults()
    faults.arm(fault(at="step", do="hang", seconds=0.2))
    engine = FaultyEngine(FakeEngine(8), faults)
    ended = threading.Event()
    thread = threading.Thread(target=lambda: (engine.step(NO_STEP), ended.set()))
    thread.start()
    await asyncio.sleep(0)
    assert not ended.is_set()
    thread.join()
    assert ended.is_set()


async def session(rpc: FaultyRpc) -> MessageStream:
    return await rpc.open("decode-0:1", Call.SESSION)


async def say_ready(stream: MessageStream) -> None:
    await stream.send(SessionReady(Incarnation(1)))
    await stream.receive()


def test_a_cut_breaks_what_is_open_and_what_is_opened_until_its_end() -> None:
    async def story() -> None:
        network, faults, clock = MemoryNetwork(), Faults(), VirtualClock()
        server = await MemoryRpc(network, "decode-0").serve("decode-0:1", {Call.SESSION: say_ready})
        rpc = FaultyRpc(MemoryRpc(network, "router-0"), faults, clock)
        bystander, suffering = await session(rpc), await session(rpc)
        await bystander.receive()
        faults.arm(fault(at="received SessionReady", do="cut", seconds=3.0))
        await suffering.receive()
        for stream in (suffering, bystander, await session(rpc)):
            with pytest.raises(StreamBroken):
                await stream.receive()
        await clock.sleep(3.0)
        assert isinstance(await (await session(rpc)).receive(), SessionReady)
        await rpc.close()
        await server.stop(0.0)

    run_virtual(story())


def run_alone(**fields: object) -> "subprocess.Popen[str]":
    """A process that suffers a fault at once, and then says that it lives."""
    code = (
        "import json, sys; from pdserve.config import FaultConfig; from pdserve.faults import Faults\n"
        "Faults().arm(FaultConfig(**json.loads(sys.argv[1]))); print('lives')"
    )
    content = fault(at="now", **fields).model_dump_json()
    return subprocess.Popen([sys.executable, "-c", code, content], stdout=subprocess.PIPE, text=True)


def test_a_killed_process_says_nothing_more() -> None:
    with run_alone(do="kill") as process:
        assert process.communicate()[0] == ""
        assert process.returncode == -signal.SIGKILL


def test_a_frozen_process_goes_on_by_itself() -> None:
    with run_alone(do="freeze", seconds=0.1) as process:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        assert process.communicate()[0] == "lives\n"


def test_a_frozen_process_goes_on_when_told() -> None:
    with run_alone(do="freeze") as process:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        process.send_signal(signal.SIGCONT)
        assert process.communicate()[0] == "lives\n"
