"""`pdserve admin` on a running system."""

import re

import httpx

from tests.integration.conftest import RaySystem


def test_the_command_shows_a_url_whose_token_opens_the_data(ray_system: RaySystem) -> None:
    done = ray_system.pdserve.run("admin")
    assert done.returncode == 0, done.stderr
    found = re.fullmatch(r"router-0  (http://127\.0\.0\.1:\d+)/admin/#token=(\S{40,})\n", done.stdout)
    assert found is not None, done.stdout
    url, token = found.groups()
    assert ray_system.pdserve.status()["routers"][0]["admin_address"] == url.removeprefix("http://")
    with httpx.Client(base_url=url, trust_env=False) as client:
        assert client.get("/admin/state").status_code == 401
        state = client.get("/admin/state", headers={"authorization": f"Bearer {token}"}).json()
    assert state["router"] == "router-0"
    assert [worker["id"] for worker in state["workers"]] == ["decode-0", "prefill-0"]


def test_what_the_launcher_says_names_the_command_and_no_token(ray_system: RaySystem) -> None:
    said = "\n".join(ray_system.up.lines)
    assert "`pdserve admin`" in said
    assert "token=" not in said
