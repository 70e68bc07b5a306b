"""docs/api.md against the code: fields, and how errors are answered."""

import re
from collections.abc import Iterator
from pathlib import Path

from pdserve.contract.errors import ErrorCode
from router.grpc_api import status_of
from router.openai_errors import error_status
from router.openai_schema import ChatBody, CompletionBody

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text()


def rows(section: str) -> Iterator[list[str]]:
    """The cells of each row of a section's table, without the head."""
    text = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    for line in lines[2:]:
        yield [cell.strip() for cell in line.strip("|").split("|")]


def test_every_field_is_listed_where_it_belongs() -> None:
    completion, chat = set(CompletionBody.model_fields), set(ChatBody.model_fields)
    places = {"both": completion & chat, "completions": completion - chat, "chat": chat - completion}
    listed: dict[str, set[str]] = {place: set() for place in places}
    for name, place, _ in rows("Fields"):
        listed[place].add(name.strip("`"))
    assert listed == places


def test_errors_are_answered_as_the_page_says() -> None:
    for name, http, grpc_status, _ in rows("Errors"):
        code = ErrorCode(name.strip("`"))
        assert (error_status(code), status_of(code).name) == (int(http), grpc_status)


def test_every_error_that_clients_can_see_is_listed() -> None:
    listed = {name.strip("`") for name, *_ in rows("Errors")}
    # Authentication is not built; the others stay between workers, or end where there is nobody to answer.
    unseen = {"unauthenticated", "cancelled", "transfer_corrupt", "fingerprint_mismatch", "stale_incarnation"}
    unseen.add("draining")
    assert listed == {code.value for code in ErrorCode} - unseen - {"protocol"}


def test_headers_are_those_that_the_code_reads_and_sends() -> None:
    sources = [path.read_text().lower() for path in (Path(__file__).parents[2] / "router").glob("*.py")]
    for name, _ in rows("Headers"):
        header = name.strip("`").lower()
        assert any(re.search(rf"[\"']{header}[\"']", source) for source in sources), header
