"""How long a worker's steps really take, against what its calibration predicts. Pure.

The calibration takes a second on an idle machine, once; heat, neighbours and long contexts come later. What
routers predict with is the calibration times these factors.
"""

from dataclasses import dataclass

from pdserve.contract.work import StepBatch, StepCost

_DECAY = 0.97
"""A step's weight after the next of its kind: about thirty steps count."""
_PRIOR_S = 0.2
"""The calibration counts like steps of so many seconds."""


@dataclass(slots=True)
class _Ratio:
    """Of two sums over the last steps; long steps weigh more than short ones."""

    taken_s: float = _PRIOR_S
    predicted_s: float = _PRIOR_S

    @property
    def value(self) -> float:
        return self.taken_s / self.predicted_s

    def add(self, taken_s: float, predicted_s: float) -> None:
        self.taken_s = _DECAY * self.taken_s + taken_s
        self.predicted_s = _DECAY * self.predicted_s + predicted_s


class StepPace:
    """Of one worker. Steps that compute prompts beside running sequences tell of neither alone and are left
    out."""

    def __init__(self, cost: StepCost) -> None:
        self._cost = cost
        self._prefill = _Ratio()
        self._decode = _Ratio()

    def note(self, batch: StepBatch, seconds: float) -> None:
        """A step has taken so long."""
        kinds = {sequence.as_decode for sequence in batch.sequences}
        if len(kinds) == 1:
            ratio = self._decode if kinds.pop() else self._prefill
            ratio.add(seconds, self._cost.predict_batch_s(batch))

    @property
    def prefill_slowdown(self) -> float:
        """How many times as long prompts take as predicted."""
        return self._prefill.value

    @property
    def decode_slowdown(self) -> float:
        """How many times as long steps take that only decode as predicted."""
        return self._decode.value
