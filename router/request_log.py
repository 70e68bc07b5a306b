"""The lines that requests leave in the router's log: one at the end of each, and one with its prompt where
`logs.prompts` is on."""

import logging

from pdserve.contract.tokens import unpack_tokens
from router.intake import ChoiceJob
from router.report_json import log_fields
from router.request_reports import RequestReport
from router.text import TextModel

log = logging.getLogger(__name__)


def log_end(report: RequestReport) -> None:
    """Neither text nor tokens are in it."""
    if log.isEnabledFor(logging.INFO):
        log.info("request ended", extra={"fields": log_fields(report)})


def log_prompt(request_id: str, choice: ChoiceJob, text_model: TextModel) -> None:
    """As the model reads it: a chat as its template writes it; token ids where there is no tokeniser."""
    tokens = choice.prompt.tokens
    prompt = text_model.decode(tokens) if text_model.has_tokenizer else unpack_tokens(tokens)
    log.info("prompt", extra={"fields": {"request_id": request_id, "prompt": prompt}})
