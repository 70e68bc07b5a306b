"""What policies that do not predict have chosen, in predicted seconds."""

from router.placement.policy import FleetView, Placement, PlacementPolicy, PlacementRequest, Prediction
from router.placement.prediction import predict_local, predict_split, sink_of, source_of, transfer_s


class Foretold:
    """Another policy, whose placements get their prediction afterwards: so its users see how well predictions
    hold before they let them decide. Its choices stay what they are."""

    def __init__(self, policy: PlacementPolicy) -> None:
        self._policy = policy

    def choose(self, request: PlacementRequest, fleet: FleetView) -> Placement | None:
        placement = self._policy.choose(request, fleet)
        if placement is None:
            return None
        return placement._replace(predicted=_predict(placement, request, fleet))


def _predict(placement: Placement, request: PlacementRequest, fleet: FleetView) -> Prediction:
    decode = fleet.decode.get(placement.decode)
    assert decode is not None, "it was chosen from there"
    sink = sink_of(decode, request, fleet.held)
    if placement.prefill is None:
        return predict_local(sink)
    prefill = fleet.prefill.get(placement.prefill)
    assert prefill is not None, "it was chosen from there"
    source = source_of(prefill, request, fleet.held.tokens(prefill))
    return predict_split(source, sink, transfer_s(source, sink, fleet))
