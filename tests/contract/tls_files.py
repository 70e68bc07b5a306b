"""Certificates made on the spot, by the commands that docs/security.md shows."""

import re
import subprocess
from pathlib import Path

from pdserve.config import TlsConfig

_PAGE = Path(__file__).resolve().parents[2] / "docs" / "security.md"


def make_files(folder: Path, name: str = "pdserve") -> TlsConfig:
    """An authority and a certificate of it for `name`, in `folder`, which is made."""
    folder.mkdir()
    for command in commands():
        subprocess.run(
            ["bash", "-c", command.replace("DNS:pdserve", f"DNS:{name}")],
            cwd=folder,
            check=True,
            capture_output=True,
        )
    return TlsConfig(
        certificate=str(folder / "node.crt"),
        key=str(folder / "node.key"),
        authority=str(folder / "authority.crt"),
    )


def commands() -> list[str]:
    """The lines of the page's first block of shell commands."""
    block = re.search(r"```sh\n(.*?)```", _PAGE.read_text(), re.DOTALL)
    assert block is not None
    return block[1].strip().splitlines()
