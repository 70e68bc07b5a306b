"""Finding a model's files, naming what they contain, and refusing what their own words rule out.

A folder is taken as it is; anything else is a hub id, fetched (or found in the local cache) through
huggingface_hub. Only safetensors weights are looked at. Never imports torch, so that the launcher can judge
a model before it starts anything.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
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
from pdserve.engine.weight_files import loaded_bytes, require_whole_weights, weight_files

_WANTED_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
_SAMPLES_PER_FILE = 16
_SAMPLE_BYTES = 4096
_SERVED_LAYERS = {"full_attention", "sliding_attention"}


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
        """Of the weights' files."""
        return sum(path.stat().st_size for path in weight_files(self.folder))

    def loaded_bytes(self, dtype: str) -> int:
        """Of the weights in memory, loaded as `dtype`; ``auto`` is the checkpoint's own."""
        text = _text_config(self.config)
        own = text.get("dtype") or text.get("torch_dtype") or ""
        return loaded_bytes(self.folder, str(own) if dtype == "auto" else dtype)


def find_checkpoint(model: str, revision: str | None) -> Checkpoint:
    """Locate `model`. Raises NotFound or ModelUnsupported, each naming what is wrong and what to do: files
    that are missing or damaged, and needs told by config.json that pdserve does not meet."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        folder = _fetch(model, revision)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise NotFound(
            f"model folder {folder} has no config.json: give the folder that save_pretrained wrote"
        )
    config = _read_config(model, config_file)
    require_whole_weights(model, folder)
    _refuse_by_config(model, config)
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


def _read_config(model: str, file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NotFound(f"model {model!r} has no readable config.json ({error}): fetch it again") from error
    if not isinstance(content, dict):
        raise NotFound(f"model {model!r} has a config.json that holds no JSON object: fetch it again")
    return content


def _refuse_by_config(model: str, config: Mapping[str, Any]) -> None:
    text = _text_config(config)
    quantization = config.get("quantization_config") or text.get("quantization_config")
    if quantization:
        method = dict(quantization).get("quant_method", "unknown method")
        raise ModelUnsupported(
            f"model {model!r} is quantised ({method}), which is not supported: use its float16, bfloat16 or "
            "float32 weights"
        )
    need = next(unmet_needs(text), None)
    if need is not None:
        kind = config.get("model_type", "unnamed")
        raise ModelUnsupported(
            f"model {model!r} ({kind}) is not supported: it needs {need}, which pdserve does not have"
        )


def unmet_needs(config: Mapping[str, Any]) -> Iterator[str]:
    """What a text model's configuration asks for outright and pdserve does not have; the engine finds the
    rest once the model is loaded."""
    strange = sorted(set(map(str, config.get("layer_types") or ())) - _SERVED_LAYERS)
    if strange:
        yield f"layers of type {', '.join(strange)}"
    if config.get("is_encoder_decoder"):
        yield "an encoder"
    if config.get("kv_lora_rank"):
        yield "keys and values of different sizes (latent attention)"
    if config.get("attention_chunk_size"):
        yield "chunked local attention"
    if config.get("num_kv_shared_layers"):
        yield "layers that share one KV cache"


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of the language model in a model that takes more than text."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _digest(folder: Path) -> str:
    """Whole weights take seconds per gigabyte to hash; headers and evenly spread samples tell apart what
    is not made to collide on purpose."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in weight_files(folder):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as weights:
            header_bytes = int.from_bytes(weights.read(8), "little")
            digest.update(weights.read(min(header_bytes, size)))
            for sample in range(_SAMPLES_PER_FILE):
                weights.seek(size * sample // _SAMPLES_PER_FILE)
                digest.update(weights.read(_SAMPLE_BYTES))
    return digest.hexdigest()
