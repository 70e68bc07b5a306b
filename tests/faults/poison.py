"""A request that kills every worker that computes it, among others that do nothing wrong."""

import contextlib
from collections.abc import Iterator

from tests.faults.load import Answer, Client, Question
from tests.faults.rehearsal import MODEL_NAME, Case, Rehearsal, Run, rehearsal
from tests.ray_cluster import private_pdserve
from tests.small_models import SmallModel

POISON = 319
"""No prompt of `tests.faults.load.questions` contains it."""
CASE = Case(
    "poison",
    "every worker that computes a certain token is killed",
    output=(20, 40),
    seed=20_000,  # always this one: the right answers must not contain the token either
)
_POISONOUS = Question((5, 6, POISON, 7), max_tokens=10, temperature=0.0, seed=0)
_FAULTS = [
    {"process": pool, "at": "step", "token": POISON, "do": "kill", "in_replacements": True}
    for pool in ("prefill", "decode")
]


@contextlib.contextmanager
def poisonable_system(model: SmallModel) -> Iterator[Rehearsal]:
    """Replacements die of the token too, as they would of a kernel that faults on it."""
    with private_pdserve() as pdserve, rehearsal(pdserve, model, faults=_FAULTS) as system:
        yield system


async def poison(system: Rehearsal) -> Run:
    """The poisonous request is sent when the others are under way, and has ended before they are judged."""
    answer = Answer()

    async def ask() -> None:
        async with Client(system.url, MODEL_NAME) as client:
            await client.read(_POISONOUS, answer)

    run = await system.run(CASE, ask)
    run.happened = bool(answer.error)
    if answer.tokens or not _is_condemned(answer):
        run.problems.append(f"the poisonous request: {answer.tokens} {answer.error or 'no error'}")
    return run


def _is_condemned(answer: Answer) -> bool:
    return answer.error.startswith("InternalServerError") and "do not send it again" in answer.error
