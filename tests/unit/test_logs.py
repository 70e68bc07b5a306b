"""Lines of the two log formats."""

import json
import logging
import sys

from pdserve.logs import JsonFormatter, TextFormatter

FIELDS = {"request_id": "a-1", "first_token_s": 0.25, "error": 'two\nlines "quoted" a=b', "empty": ""}


def record(message: str, *args: object, fields: dict[str, object] | None = None) -> logging.LogRecord:
    made = logging.LogRecord("router.journey", logging.INFO, __file__, 1, message, args, None)
    made.created = 1_700_000_000.5
    if fields is not None:
        made.__dict__["fields"] = fields
    return made


def test_fields_follow_the_message_and_begin_no_line() -> None:
    line = TextFormatter("router-0").format(record("request %s", "ended", fields=FIELDS))
    rest = 'request_id=a-1 first_token_s=0.25 error="two\\nlines \\"quoted\\" a=b" empty=""'
    assert line.endswith(f" INFO router-0 router.journey: request ended {rest}")
    assert "\n" not in line


def test_a_text_line_without_fields_is_as_it_was() -> None:
    line = TextFormatter("router-0").format(record("hello %d", 5))
    assert line.endswith(" INFO router-0 router.journey: hello 5")


def test_json_lines_have_the_fields_as_members() -> None:
    line = JsonFormatter("router-0").format(record("request %s", "ended", fields=FIELDS))
    assert "\n" not in line
    event = json.loads(line)
    assert event.pop("time") == "2023-11-14T22:13:20.500+00:00"
    head = {"level": "INFO", "process": "router-0", "logger": "router.journey", "message": "request ended"}
    assert event == head | FIELDS


def test_a_json_line_has_its_traceback() -> None:
    failed = record("it broke")
    try:
        raise ValueError("why")
    except ValueError:
        failed.exc_info = sys.exc_info()
    line = JsonFormatter("router-0").format(failed)
    assert "\n" not in line
    assert "ValueError: why" in json.loads(line)["exception"]
