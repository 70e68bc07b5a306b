"""The house: which folders there are, who may import whom, and what pure and light modules reach."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = {"router", "prefill_worker", "decode_worker", "load_generator"}
PACKAGES = {"pdserve", "controller", "simulator", *ROOMS}
PURE_MODULES = (
    "pdserve.contract.block_names",
    "pdserve.contract.errors",
    "pdserve.contract.messages",
    "pdserve.contract.ports",
    "pdserve.engine.block_allocator",
    "pdserve.engine.chunking",
    "router.admission",
    "router.placement",
    "router.prefix_index",
    "prefill_worker.scheduler",
    "decode_worker.scheduler",
)
UNPICKLERS = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "multiprocessing"}
"""Modules that turn bytes into objects of any kind."""
UNPICKLING_CALLS = {
    *("torch.load", "torch.package", "torch.multiprocessing", "numpy.load", "np.load"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec"),
}
UNPICKLING_COLLECTIVES = re.compile(r"\.(\w+_object(_list)?|rpc_sync|rpc_async)$")
"""torch.distributed's collectives of objects."""
ROUTER_EDGES = ("router.router", "router.http_api", "router.http_server", "router.grpc_api", "router.text")
NO_NAMES_OF_THE_DOMAIN = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}


def settings() -> dict[str, Any]:
    """What pyproject.toml tells the tools."""
    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"])


def loaded_after_importing(*modules: str) -> set[str]:
    """Top-level names in sys.modules of a fresh interpreter that has imported `modules`."""
    code = f"import sys, {', '.join(modules)}; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_import_rules_are_kept() -> None:
    # A process of its own: import-linter's configuration of logging would silence ours.
    command = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_rules_cover_all_packages() -> None:
    assert set(settings()["importlinter"]["root_packages"]) == PACKAGES
    included = set(settings()["setuptools"]["packages"]["find"]["include"])
    assert included == PACKAGES | {f"{name}.*" for name in PACKAGES}


def test_the_top_level_has_the_packages_of_the_house_and_no_other() -> None:
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == PACKAGES | {"tests", "benchmarks"}


def test_proto_holds_protos_only() -> None:
    files = [path for path in (ROOT / "proto").rglob("*") if path.is_file()]
    assert files
    assert {path.suffix for path in files} == {".proto"}


def test_deploy_holds_no_python() -> None:
    assert not list((ROOT / "deploy").rglob("*.py"))


def test_every_room_tells_the_life_of_a_request_in_numbered_steps() -> None:
    for room in ROOMS | {"controller", "simulator"}:
        docstring = (ROOT / room / "__init__.py").read_text()
        assert re.findall(r"^(\d)\. ", docstring, re.MULTILINE)[:3] == ["1", "2", "3"], room


def test_files_are_nouns_of_the_domain() -> None:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert not [path for path in files if path.stem in NO_NAMES_OF_THE_DOMAIN]


def names_used(source: Path) -> set[str]:
    """The modules that a file imports, and the dotted names that it calls."""
    tree = ast.parse(source.read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return imported | called


def test_nothing_unpickles() -> None:
    """What arrives at a port of our own becomes messages and bytes, never code. Ray's ports are Ray's."""
    for source in [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]:
        used = names_used(source)
        assert not {name.split(".")[0] for name in used} & UNPICKLERS, source
        assert not used & UNPICKLING_CALLS, source
        assert not [name for name in used if UNPICKLING_COLLECTIVES.search(name)], source


def test_pure_modules_reach_no_loop_no_wire_and_no_device() -> None:
    reached = loaded_after_importing(*PURE_MODULES)
    assert not reached & {"asyncio", "ray", "torch", "grpc", "prometheus_client", "numpy"}


def test_every_scheduler_is_among_the_pure_modules() -> None:
    contracts = settings()["importlinter"]["contracts"]
    (pure,) = [set(each["source_modules"]) for each in contracts if each["name"].startswith("Pure modules")]
    schedulers = {f"{room}.scheduler" for room in ROOMS if (ROOT / room / "scheduler.py").exists()}
    assert schedulers <= pure


def test_a_router_reaches_neither_torch_nor_ray() -> None:
    assert not loaded_after_importing(*ROUTER_EDGES) & {"torch", "ray"}


@pytest.mark.parametrize("module", ["prefill_worker.loop", "decode_worker.loop", "pdserve.engine.engine"])
def test_rooms_and_engine_do_not_reach_ray(module: str) -> None:
    assert "ray" not in loaded_after_importing(module)
