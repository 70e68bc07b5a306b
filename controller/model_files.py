"""Finding and judging a model's files before anything is started, and a router's part of them.

Imports no torch where the model is one of transformers' own.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from controller.plan import ModelSource
from controller.room import may_use_gpu, require_room_for_all
from pdserve.config import DeployConfig
from pdserve.contract.errors import ModelUnsupported, NotFound
from pdserve.demo import demo_model_path
from pdserve.engine.checkpoint import Checkpoint, find_checkpoint
from pdserve.memory import available_main_memory

DEMO_NAME = "pdserve-demo"
TEXT_FILES = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]


def resolve_model(config: DeployConfig, fetch: bool, takes_turns: bool = False) -> ModelSource:
    """Which model `config` means. With `fetch` its files are brought here first, so that everybody on this
    machine finds them in one folder, and what can be told from them is refused here rather than by a worker:
    also that there is no room for all workers, unless each takes the place of one that runs (`takes_turns`).
    Raises NotFound, ModelUnsupported or ConfigError."""
    wanted = config.model.path
    path = wanted or str(demo_model_path())
    name = config.model.served_name or (_default_name(path) if wanted else DEMO_NAME)
    if not fetch:
        return ModelSource(path, config.model.revision, name)
    checkpoint = find_checkpoint(path, config.model.revision)
    _require_known_architecture(path, checkpoint.config, config.model.trust_remote_code)
    if not takes_turns:
        _require_room(config, path, checkpoint)
    return ModelSource(str(checkpoint.folder.absolute()), config.model.revision, name)


def fetch_text_files(model: ModelSource) -> Path:
    """The folder with the tokeniser of `model` on this machine. Raises NotFound."""
    folder = Path(model.path).expanduser()
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(model.path, revision=model.revision, allow_patterns=TEXT_FILES))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise NotFound(
            f"the tokenizer of model {model.path!r} is neither a folder here nor on the hub: check the name, "
            "or that the folder is there on every node"
        ) from error


def _require_room(config: DeployConfig, path: str, checkpoint: Checkpoint) -> None:
    if not may_use_gpu(config.model.device):
        weight_bytes = checkpoint.loaded_bytes(config.model.dtype)
        require_room_for_all(config, path, weight_bytes, available_main_memory())


def _require_known_architecture(path: str, config: Mapping[str, Any], trust_remote_code: bool) -> None:
    kind = str(config.get("model_type", ""))
    brings_code = "auto_map" in config
    if not kind or (brings_code and trust_remote_code) or _is_of_transformers(kind):
        return
    if brings_code:
        raise ModelUnsupported(
            f"model {path!r} ({kind}) brings its own Python code: set model.trust_remote_code if you trust it"
        )
    raise ModelUnsupported(
        f"model {path!r} has architecture {kind!r}, which the installed transformers does not know: update "
        "transformers, or choose another model"
    )


def _is_of_transformers(kind: str) -> bool:
    """Most kinds are the name of a folder. Only for the rest transformers has to be imported, with torch."""
    package = importlib.util.find_spec("transformers")
    if package is not None and any(
        (Path(folder) / "models" / kind / "__init__.py").is_file()
        for folder in package.submodule_search_locations or ()
    ):
        return True
    from transformers import CONFIG_MAPPING

    return kind in CONFIG_MAPPING


def _default_name(path: str) -> str:
    """The hub id, or the folder's name."""
    folder = Path(path).expanduser()
    return folder.resolve().name if folder.is_dir() else path
