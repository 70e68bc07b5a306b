"""Finding a model's files before anything is started, and a router's part of them. Never imports torch."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from controller.plan import ModelSource
from pdserve.config import DeployConfig
from pdserve.contract.errors import NotFound
from pdserve.demo import demo_model_path
from pdserve.engine.checkpoint import find_checkpoint

DEMO_NAME = "pdserve-demo"
_TEXT_FILES = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]


def resolve_model(config: DeployConfig, fetch: bool) -> ModelSource:
    """Which model `config` means. With `fetch` its files are brought here first, so that everybody on this
    machine finds them in one folder. Raises NotFound or ModelUnsupported."""
    wanted = config.model.path
    path = wanted or str(demo_model_path())
    name = config.model.served_name or (_default_name(path) if wanted else DEMO_NAME)
    if not fetch:
        return ModelSource(path, config.model.revision, name)
    checkpoint = find_checkpoint(path, config.model.revision)
    return ModelSource(str(checkpoint.folder.absolute()), config.model.revision, name)


def fetch_text_files(model: ModelSource) -> Path:
    """The folder with the tokeniser of `model` on this machine. Raises NotFound."""
    folder = Path(model.path).expanduser()
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(model.path, revision=model.revision, allow_patterns=_TEXT_FILES))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise NotFound(
            f"the tokenizer of model {model.path!r} is neither a folder here nor on the hub: check the name, "
            "or that the folder is there on every node"
        ) from error


def _default_name(path: str) -> str:
    """The hub id, or the folder's name."""
    folder = Path(path).expanduser()
    return folder.resolve().name if folder.is_dir() else path
