"""Generate the committed protobuf and gRPC modules from proto/, beside the packages they belong to.

    python tools/make_stubs.py            write them
    python tools/make_stubs.py --check    fail when a committed one differs from what would be written

Generated code refuses a runtime older than its generator, so the generator is the oldest version that the
project supports: the grpcio-tools pinned in pyproject.toml's extra "dev".
"""

import argparse
import importlib.metadata
import subprocess
import sys
import tempfile
from importlib import resources
from pathlib import Path

GENERATOR_VERSION = "1.76.0"
ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    _require_generator()
    with tempfile.TemporaryDirectory() as folder:
        generated = _generate(Path(folder))
    return _compare(generated) if check else _write(generated)


def _require_generator() -> None:
    try:
        version = importlib.metadata.version("grpcio-tools")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    if version != GENERATOR_VERSION:
        sys.exit(
            f"grpcio-tools is {version}, the stubs are made with {GENERATOR_VERSION}: "
            f"run `pip install grpcio-tools=={GENERATOR_VERSION}`, if need be in an environment of its own"
        )


def _generate(folder: Path) -> dict[Path, str]:
    """The text of every generated module by its path in the repository."""
    protos = sorted(PROTO.rglob("*.proto"))
    services = [path for path in protos if "\nservice " in path.read_text()]
    _protoc([f"--python_out={folder}", f"--pyi_out={folder}"], protos)
    _protoc([f"--grpc_python_out={folder}"], services)
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder): path.read_text() for path in paths}


def _protoc(outputs: list[str], protos: list[Path]) -> None:
    well_known = resources.files("grpc_tools") / "_proto"
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO}", f"-I{well_known}", *outputs]
    subprocess.run([*command, *map(str, protos)], check=True)


def _write(generated: dict[Path, str]) -> int:
    for path, text in generated.items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(text)
    for path in _orphans(generated):
        (ROOT / path).unlink()
    return 0


def _compare(generated: dict[Path, str]) -> int:
    differing = [path for path, text in generated.items() if _committed(path) != text]
    for path in [*differing, *_orphans(generated)]:
        print(f"{path} differs from proto/: run `make proto`", file=sys.stderr)
    return 1 if differing or _orphans(generated) else 0


def _committed(path: Path) -> str | None:
    return (ROOT / path).read_text() if (ROOT / path).exists() else None


def _orphans(generated: dict[Path, str]) -> list[Path]:
    """Generated modules whose .proto is gone."""
    folders = {path.parent for path in generated}
    committed = {path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).glob("*_pb2*.py*")}
    return sorted(committed - set(generated))


if __name__ == "__main__":
    sys.exit(main())
