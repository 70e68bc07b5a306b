"""Finding a model's files and naming what they contain.

A folder is taken as it is; anything else is a hub id, fetched (or found in the local cache) through
huggingface_hub. Only safetensors weights are looked at.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pdserve.contract.errors import ModelUnsupported, NotFound

_WANTED_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
_SAMPLES_PER_FILE = 16
_SAMPLE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model's files on this machine."""

    folder: Path
    revision: str
    """The commit of a hub model, else the first digits of `digest`."""
    digest: str
    """Equal for equal files: SHA-256 over the configuration and samples of the weights."""
    config: dict[str, Any]
    """config.json."""

    @property
    def weight_bytes(self) -> int:
        return sum(path.stat().st_size for path in _weight_files(self.folder))


def find_checkpoint(model: str, revision: str | None) -> Checkpoint:
    """Locate `model`. Raises NotFound or ModelUnsupported, each naming what is missing and what to do."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        folder = _fetch(model, revision)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise NotFound(
            f"model folder {folder} has no config.json: give the folder that save_pretrained wrote"
        )
    _require_safetensors(model, folder)
    config = json.loads(config_file.read_text())
    digest = _digest(folder)
    commit = folder.name if folder.parent.name == "snapshots" else ""
    return Checkpoint(folder, commit or digest[:12], digest, config)


def _fetch(model: str, revision: str | None) -> Path:
    where = f"model {model!r}" + (f" at revision {revision!r}" if revision else "")
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise NotFound(f"model folder {model} does not exist: check the path, or give a hub id")
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_WANTED_FILES))
    except GatedRepoError as error:
        raise NotFound(
            f"{where} needs an access token: accept its terms on the hub and set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise NotFound(f"{where} does not exist on the hub: check the revision") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise NotFound(f"{where} is neither a folder here nor on the hub: check the name") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise NotFound(
            f"{where} is neither a folder here nor in the local cache, and the hub cannot be reached: check "
            "the path and the network"
        ) from error


def _require_safetensors(model: str, folder: Path) -> None:
    if _weight_files(folder):
        return
    pickles = [path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth"))]
    found = f"only pickled weights ({', '.join(sorted(pickles))})" if pickles else "no weights"
    raise ModelUnsupported(
        f"model {model!r} has {found}: pdserve loads safetensors only; convert it with "
        "save_pretrained(..., safe_serialization=True)"
    )


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _digest(folder: Path) -> str:
    """Whole weights take seconds per gigabyte to hash; headers and evenly spread samples tell apart what
    is not made to collide on purpose."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in _weight_files(folder):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as weights:
            header_bytes = int.from_bytes(weights.read(8), "little")
            digest.update(weights.read(min(header_bytes, size)))
            for sample in range(_SAMPLES_PER_FILE):
                weights.seek(size * sample // _SAMPLES_PER_FILE)
                digest.update(weights.read(_SAMPLE_BYTES))
    return digest.hexdigest()
