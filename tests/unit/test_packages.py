"""A transport that needs a package says so before anything is started."""

import sys

import pytest

from controller.packages import require_packages
from pdserve.config import load_config
from pdserve.contract.errors import ConfigError


def test_a_missing_package_is_named_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = load_config(None, {"network.transports": ["nixl", "grpc"]})
    with pytest.raises(ConfigError, match=r"pip install 'pdserve\[nixl\]'"):
        require_packages(config)


def test_nothing_is_needed_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nixl", None)
    require_packages(load_config())
