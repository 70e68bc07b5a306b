"""Whatever keeps a process from starting, as one line that names the cause."""

from pdserve.contract.errors import ErrorCode, ErrorInfo, PdserveError

LOGS = "more is in Ray's logs, by default in /tmp/ray/session_latest/logs"


def start_error(error: Exception) -> ErrorInfo:
    """What the controller is told. An error of this project says itself what to do, and says so again at the
    next start. Any other has the code INTERNAL: it counts as a death, because it may have to do with the
    moment, as when memory is short while a neighbour loads."""
    if isinstance(error, PdserveError):
        return error.info
    if _is_out_of_memory(error):
        return ErrorInfo(
            ErrorCode.INTERNAL,
            f"it ran out of memory ({_first_line(error)}): lower engine.kv_memory, start fewer workers, or "
            "choose a smaller model or model.dtype",
        )
    return ErrorInfo(ErrorCode.INTERNAL, f"{type(error).__name__}: {_first_line(error)}; {LOGS}")


def _is_out_of_memory(error: Exception) -> bool:
    """By name for torch's own, because a router has no torch."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no more is known"
