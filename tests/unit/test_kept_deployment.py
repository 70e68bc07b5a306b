"""What a restarted controller finds of what was wanted last."""

from dataclasses import replace

from controller.kept_deployment import restored, written
from controller.plan import Deployment, ModelSource
from controller.rollout import rolled_out
from pdserve.config import load_config

OPTIONS = {
    "pools.prefill.replicas": 2,
    "pools.decode.env": {"A": "b"},
    "engine.kv_memory": "512MiB",
    "network.worker_ports": "20000-20010",
    "faults": [{"process": "decode", "at": "now", "do": "kill"}],
}


def test_everything_that_may_have_changed_is_found_again() -> None:
    first = Deployment(load_config(None, OPTIONS), ModelSource("m", None, "m"))
    later = first.resized({"prefill": 1, "decode": 3})
    newer = rolled_out(
        later, load_config(None, OPTIONS | {"engine.kv_memory": 0.5}), ModelSource("m", "v2", "m")
    )
    for deployment in (first, later, newer, replace(newer, rollout_deadline_s=600.0)):
        assert restored(first, written(deployment)) == deployment


def test_secrets_are_not_written() -> None:
    first = Deployment(load_config(None), ModelSource("m", None, "m"))
    content = written(first).decode()
    assert first.token.secret not in content
    assert first.admin_token.secret not in content
