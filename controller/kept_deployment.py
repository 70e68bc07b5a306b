"""What is wanted of a system, kept where a restarted controller finds it: in Ray's own store.

Ray starts a controller again with the arguments of its first start, so what was changed since then (the sizes
of pools, a new configuration) has to be somewhere else. The deployment's token and
keys are not among it; the variables of `pools.*.env` are, so whoever reads Ray's store reads these.
"""

import asyncio
import json
from dataclasses import asdict, replace

from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

from controller.plan import Deployment, ModelSource
from pdserve.config import DeployConfig

_NAMESPACE = b"pdserve"


class KeptDeployment:
    """Of one start of a system: another start, also of the same name, finds nothing of it."""

    def __init__(self, first: Deployment) -> None:
        self._first = first
        self._key = f"deployment/{first.start_id}".encode()

    def recall(self) -> Deployment:
        """The last that was kept, else the first one."""
        content = _internal_kv_get(self._key, namespace=_NAMESPACE)
        return self._first if content is None else restored(self._first, content)

    async def keep(self, deployment: Deployment) -> None:
        content = written(deployment)
        await asyncio.to_thread(_internal_kv_put, self._key, content, overwrite=True, namespace=_NAMESPACE)

    async def forget(self) -> None:
        """The system ends."""
        await asyncio.to_thread(_internal_kv_del, self._key, namespace=_NAMESPACE)


def written(deployment: Deployment) -> bytes:
    """What may have changed since the first start."""
    fields = {
        "config": deployment.config.model_dump(mode="json"),
        "model": asdict(deployment.model),
        "generation": deployment.generation,
        "rollout_deadline_s": deployment.rollout_deadline_s,
    }
    return json.dumps(fields).encode()


def restored(first: Deployment, content: bytes) -> Deployment:
    """The deployment that was written, where `first` is what it was at its start."""
    fields = json.loads(content)
    return replace(
        first,
        config=DeployConfig.model_validate(fields["config"]),
        model=ModelSource(**fields["model"]),
        generation=fields["generation"],
        rollout_deadline_s=fields["rollout_deadline_s"],
    )
