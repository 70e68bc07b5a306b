"""Logging: one line per event, with time, level, process name and logger.

An event may have fields beside its message, names and values in `fields` of the record: they are written as
name=value behind the message, or as members of the event's JSON object.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal


def set_up_logging(process: str, level: str = "INFO", log_format: Literal["text", "json"] = "text") -> None:
    """Log to stderr. `process` names this worker or router in every line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(process) if log_format == "json" else TextFormatter(process))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)


class TextFormatter(logging.Formatter):
    """For people."""

    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {process} %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name for it
        fields = (f"{name}={_shown(value)}" for name, value in _fields(record).items())
        return " ".join([super().formatMessage(record), *fields])


class JsonFormatter(logging.Formatter):
    """One object per line: time, level, process, logger, message, the event's fields, and a traceback as
    `exception`."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        event: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            event["exception"] = self.formatException(record.exc_info)
        return json.dumps(event, default=str)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = getattr(record, "fields", {})
    return fields


def _shown(value: Any) -> str:
    """As it is where that cannot be misread, else as a JSON string: no value begins a new line or field."""
    text = str(value)
    plain = text != "" and text.isascii() and text.isprintable() and not set(text) & set(' "=')
    return text if plain else json.dumps(text)
