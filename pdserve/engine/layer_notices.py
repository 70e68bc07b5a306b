"""Telling, while a step of a model runs, how many layers have their new KV in the pool."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

import torch

from pdserve.contract.ports import LayersDone
from pdserve.engine.layer_groups import group_stops


class LayerNotices:
    """What the attention layers of one engine tell of its steps.

    On a GPU a write that was launched has not happened yet: there an event is recorded behind it, and a
    thread gives the notice when the event has completed.
    """

    def __init__(self, num_layers: int, device: torch.device) -> None:
        self._stops = frozenset(group_stops(num_layers))
        self._tell: LayersDone | None = None
        self._num_written = 0  # leading layers, in the step that runs
        self._waiter = ThreadPoolExecutor(1, "layer-events") if device.type == "cuda" else None
        self._waits: list[Future[None]] = []

    @contextmanager
    def given_to(self, tell: LayersDone | None) -> Iterator[None]:
        """Around one step. When the block has ended nothing more is told of it."""
        self._tell, self._num_written = tell, 0
        try:
            yield
        finally:
            self._tell = None
            waits, self._waits = self._waits, []
            wait(waits)
        for ended in waits:
            ended.result()

    def written(self, layer: int) -> None:
        """The keys and values of `layer` are written, or on a GPU launched to be."""
        if self._tell is None or layer != self._num_written:
            return  # nobody asked, or a model that does not compute its layers in order
        self._num_written += 1
        if self._num_written in self._stops:
            self._give(self._tell, self._num_written)

    def _give(self, tell: LayersDone, num_layers: int) -> None:
        if self._waiter is None:
            tell(num_layers)
            return
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record()
        self._waits.append(self._waiter.submit(_tell_after, event, tell, num_layers))


def _tell_after(event: "torch.cuda.Event", tell: LayersDone, num_layers: int) -> None:
    event.synchronize()
    tell(num_layers)
