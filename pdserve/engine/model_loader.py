"""Loading a causal language model of transformers, or refusing it by name."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from pdserve.contract.errors import ModelUnsupported
from pdserve.engine.checkpoint import Checkpoint, unmet_needs
from pdserve.engine.settings import EngineSettings

_BATCH_DEPENDENT_ROPE = {"longrope", "dynamic"}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in evaluation mode on its device, with eager attention."""

    model: Any
    """A PreTrainedModel with a language-modelling head."""
    config: Any
    """The configuration of the text model."""
    architecture: str
    dtype: torch.dtype
    max_model_len: int
    eos_token_ids: tuple[int, ...]


def load_model(checkpoint: Checkpoint, settings: EngineSettings, device: torch.device) -> LoadedModel:
    """Load the weights. Raises ModelUnsupported naming the model and what it needs that is not there."""
    config = _load_config(checkpoint, settings)
    text_config = config.get_text_config(decoder=True)
    _refuse_by_config(settings.model, text_config)
    model = _load_weights(checkpoint, settings, config).to(device).eval().requires_grad_(False)
    _refuse_by_class(settings.model, model)
    return LoadedModel(
        model=model,
        config=text_config,
        architecture=type(model).__name__,
        dtype=model.dtype,
        max_model_len=_max_model_len(settings, text_config),
        eos_token_ids=_eos_token_ids(model, text_config),
    )


def _load_config(checkpoint: Checkpoint, settings: EngineSettings) -> Any:
    try:
        return AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=settings.trust_remote_code)
    except (ValueError, KeyError, OSError) as error:
        kind = checkpoint.config.get("model_type", "unnamed")
        if "auto_map" in checkpoint.config and not settings.trust_remote_code:
            raise ModelUnsupported(
                f"model {settings.model!r} ({kind}) brings its own Python code: set trust_remote_code if you "
                "trust it"
            ) from error
        raise ModelUnsupported(
            f"model {settings.model!r} has architecture {kind!r}, which the installed transformers does not "
            f"know: {_first_line(error)}"
        ) from error


def _load_weights(checkpoint: Checkpoint, settings: EngineSettings, config: Any) -> Any:
    dtype = "auto" if settings.dtype == "auto" else getattr(torch, settings.dtype)
    had_progress_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # the launcher shows its own progress
    try:
        return AutoModelForCausalLM.from_pretrained(
            checkpoint.folder,
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            use_safetensors=True,
            trust_remote_code=settings.trust_remote_code,
        )
    except (ValueError, KeyError, OSError, ImportError, RuntimeError) as error:
        raise ModelUnsupported(
            f"model {settings.model!r} ({config.model_type}) cannot be loaded as a causal language model: "
            f"{_first_line(error)}"
        ) from error
    finally:
        if had_progress_bar:
            transformers_logging.enable_progress_bar()


def _refuse_by_config(name: str, config: Any) -> None:
    """As `find_checkpoint` did by config.json, now also by what the configuration's class adds to it."""
    told = config.to_dict() | {"layer_types": getattr(config, "layer_types", None)}  # derived in some classes
    need = next(unmet_needs(told), None)
    if need is not None:
        raise _unsupported(name, config.model_type, need)


def _refuse_by_class(name: str, model: Any) -> None:
    kind = model.config.model_type
    if getattr(model, "_is_stateful", False):
        raise _unsupported(name, kind, "recurrent state beside the KV cache")
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise _unsupported(name, kind, "positions that cannot be given from outside (no position_ids)")


def _max_model_len(settings: EngineSettings, config: Any) -> int:
    """The model's length, or the shorter one asked for.

    Rope that depends on the longest sequence of the batch (longrope, dynamic) behaves like plain rope up
    to the length the model was first trained for; beyond it a sequence would change its neighbours' tokens
    and its own cached keys, so that length is the limit.
    """
    limit = int(config.max_position_embeddings)
    why = "max_position_embeddings of the model"
    rope_kinds = _rope_types(config) & _BATCH_DEPENDENT_ROPE
    if rope_kinds:
        limit = min(limit, _original_length(config))
        why = f"length up to which its rope ({', '.join(sorted(rope_kinds))}) does not depend on the batch"
    wanted = settings.max_model_len
    if wanted is not None and wanted > limit:
        raise ModelUnsupported(
            f"max_model_len {wanted} is more than {limit}, the {why} ({settings.model!r}): give at most "
            f"{limit}",
            param="max_model_len",
        )
    return wanted or limit


def _rope_types(config: Any) -> set[str]:
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return {str(p["rope_type"]) for p in (parameters, *nested) if "rope_type" in p}


def _original_length(config: Any) -> int:
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    lengths = [p.get("original_max_position_embeddings") for p in (parameters, *nested)]
    lengths.append(getattr(config, "original_max_position_embeddings", None))
    return min(int(length) for length in (*lengths, config.max_position_embeddings) if length)


def _eos_token_ids(model: Any, config: Any) -> tuple[int, ...]:
    generation = getattr(model, "generation_config", None)
    for source in (generation, config):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return tuple(sorted(set(ids if isinstance(ids, list | tuple) else [ids])))
    return ()


def _unsupported(name: str, kind: str, need: str) -> ModelUnsupported:
    return ModelUnsupported(
        f"model {name!r} ({kind}) is not supported: it needs {need}, which pdserve does not have"
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
