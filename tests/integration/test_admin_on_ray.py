"""`pdserve admin` and `pdserve top` on a running system."""

import contextlib
import os
import pty
import re
import signal
from collections.abc import Iterator
from typing import IO

import httpx

from tests.integration.conftest import RaySystem

HOME = b"\x1b[H"


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


def test_top_shows_every_worker_once_for_scripts(ray_system: RaySystem) -> None:
    done = ray_system.pdserve.run("top", "--once")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    head, *lines = done.stdout.splitlines()
    assert head.endswith(" as router-0 sees it: ready")
    rows = {words[0]: words[1] for line in lines if len(words := line.split()) > 1}
    assert (rows["decode-0"], rows["prefill-0"]) == ("ready", "ready")
    assert (rows["decode"], rows["prefill"]) == ("1/1", "1/1")


def test_top_goes_on_until_it_is_interrupted(ray_system: RaySystem) -> None:
    """Piped: one picture after the other."""
    with ray_system.pdserve.begin("top") as top:
        assert top.stdout is not None
        heads = [line for line, _ in zip(_heads(top.stdout), range(3), strict=False)]
        top.send_signal(signal.SIGINT)
        assert top.wait(20) == 130
    assert heads == [heads[0]] * 3


def test_top_draws_over_a_terminal_and_gives_it_back(ray_system: RaySystem) -> None:
    ours, theirs = pty.openpty()
    with ray_system.pdserve.begin("top", stdout=theirs) as top:
        os.close(theirs)
        seen = b""
        while seen.count(HOME) < 2:
            seen += os.read(ours, 4096)
        top.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # how the end of a terminal shows
            while piece := os.read(ours, 4096):
                seen += piece
        assert top.wait(20) == 130
    os.close(ours)
    assert seen.startswith(b"\x1b[?1049h\x1b[?25l" + HOME)
    assert seen.endswith(b"\x1b[?25h\x1b[?1049l")


def _heads(output: IO[str]) -> Iterator[str]:
    return (line for line in output if " sees it: " in line)


def test_a_router_that_is_not_there_is_named(ray_system: RaySystem) -> None:
    line = ray_system.pdserve.refusal("top", "--router", "router-7")
    assert "no router 'router-7' has an admin server: there are router-0" in line


def test_what_the_launcher_says_names_the_command_and_no_token(ray_system: RaySystem) -> None:
    said = "\n".join(ray_system.up.lines)
    assert "`pdserve admin`" in said
    assert "token=" not in said
