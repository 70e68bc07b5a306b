"""Logging: one line per event, with time, level, process name and logger."""

import logging
import sys

_FORMAT = "%(asctime)s %(levelname)s {process} %(name)s: %(message)s"


def set_up_logging(process: str, level: str = "INFO") -> None:
    """Log to stderr. `process` names this worker or router in every line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(_FORMAT.format(process=process)))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)
