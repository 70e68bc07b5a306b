"""What another configuration makes of a running system: its workers are replaced, everything else stays."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel, ValidationError

from controller.model_files import TEXT_FILES, fetch_text_files
from controller.plan import Deployment, ModelSource
from pdserve.config import DeployConfig, NetworkConfig, PoolConfig, PoolsConfig
from pdserve.contract.errors import ConfigError

_REPLACED = ("model", "engine", "network.transports", "pools")
"""Keys and sections that workers read when they start. Sizes of pools are among them and are not changed."""


def rolled_out(now: Deployment, config: DeployConfig, model: ModelSource) -> Deployment:
    """`now` with what `config` says of the workers, a generation later; `now` itself where that is the same.
    Raises ConfigError that names what cannot change in a running system."""
    if model.served_name != now.model.served_name:
        raise ConfigError(
            f"the routers serve {now.model.served_name!r}, not {model.served_name!r}: set model.served_name, "
            "or start another system",
            param="model.served_name",
        )
    for key, wanted, current in _differences(config, now.config):
        if not any(key == name or key.startswith(f"{name}.") for name in _REPLACED):
            raise ConfigError(
                f"{key} is {current!r} and cannot become {wanted!r} while the system runs: a rollout changes "
                f"{', '.join(_REPLACED)} only",
                param=key,
            )
    merged = now.config.model_copy(
        update={
            "model": config.model,
            "engine": config.engine,
            "pools": _pools(now.config.pools, config.pools),
            "network": _network(now.config.network, config.network),
        }
    )
    if (merged, model) == (now.config, now.model):
        return now
    return replace(now, config=merged, model=model, generation=now.generation + 1)


def require_same_text(now: ModelSource, new: ModelSource) -> None:
    """Raises ConfigError when another tokeniser or chat template comes with `new`: the routers go on with
    those that they have."""
    if now == new:
        return
    folders = fetch_text_files(now), fetch_text_files(new)
    for name in TEXT_FILES:
        one, other = (_content(folder / name) for folder in folders)
        if one != other:
            raise ConfigError(
                f"{name} of {new.path!r} is not that of the running model, with which the routers go on: "
                "start another system for it",
                param="model.path",
            )


def _differences(
    wanted: BaseModel, current: BaseModel, above: str = ""
) -> Iterator[tuple[str, object, object]]:
    """(key, wanted, current) of all that is written down in `wanted` and is not so; a port 0 is any."""
    for name in sorted(wanted.model_fields_set):
        one, other = getattr(wanted, name), getattr(current, name)
        if isinstance(one, BaseModel) and isinstance(other, BaseModel):
            yield from _differences(one, other, f"{above}{name}.")
        elif one != other and not (one == 0 and name.endswith("port")):
            yield f"{above}{name}", one, other


def _pools(now: PoolsConfig, new: PoolsConfig) -> PoolsConfig:
    return new.model_copy(
        update={"prefill": _pool(now.prefill, new.prefill), "decode": _pool(now.decode, new.decode)}
    )


def _pool(now: PoolConfig, new: PoolConfig) -> PoolConfig:
    return new.model_copy(update={"replicas": now.replicas})


def _network(now: NetworkConfig, new: NetworkConfig) -> NetworkConfig:
    """Raises ConfigError where the new transports break what the running network promises."""
    try:
        return NetworkConfig.model_validate(now.model_dump(mode="json") | {"transports": new.transports})
    except ValidationError as error:
        why = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(f"network.{why}", param="network.transports") from None


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.exists() else None
