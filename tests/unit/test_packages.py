"""What needs a package says so before anything is started."""

import sys

import pytest

from controller.packages import require_packages
from controller.plan import Deployment, ModelSource, ProcessPlan
from controller.status import ProcessSpec
from controller.tracing import tracer_of
from pdserve.clock import LoopClock
from pdserve.config import load_config
from pdserve.contract.errors import ConfigError


def test_a_missing_package_is_named_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = load_config(None, {"network.transports": ["nixl", "grpc"]})
    with pytest.raises(ConfigError, match=r"pip install 'pdserve\[nixl\]'"):
        require_packages(config)


def test_missing_packages_of_traces_are_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(None, {"tracing.endpoint": "http://127.0.0.1:4317"})
    require_packages(config)
    monkeypatch.delitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto", None)
    with pytest.raises(ConfigError, match=r"pip install 'pdserve\[otel\]'"):
        require_packages(config)


def test_a_process_whose_node_has_no_packages_of_traces_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(None, {"tracing.endpoint": "http://127.0.0.1:4317"})
    deployment = Deployment(config, ModelSource("m", None, "m"))
    plan = ProcessPlan(ProcessSpec("decode-0", "decode", 0), deployment, num_neighbours=1)
    monkeypatch.delitem(sys.modules, "pdserve.tracing", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ConfigError, match=r"opentelemetry is not installed on the node of decode-0"):
        tracer_of(plan, LoopClock())


def test_nothing_is_needed_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nixl", None)
    require_packages(load_config())
