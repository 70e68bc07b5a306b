"""How a prompt's KV is cut into segments: every layer of every block once, whatever waits for whom."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from pdserve.contract.work import LayerRange
from pdserve.handoff.shipping import Shipment, Shipping

LARGE = 10_000


def test_what_waits_is_joined() -> None:
    shipping = Shipping(num_blocks=8, num_layers=4)
    assert shipping.next(window=1, max_block_layers=LARGE) is None
    shipping.blocks_are_ready(2)
    assert shipping.next(1, LARGE) == Shipment(0, 0, 2, LayerRange(0, 4))
    shipping.blocks_are_ready(4)
    shipping.blocks_are_ready(6)
    shipping.layers_are_ready(1)
    shipping.layers_are_ready(3)
    assert shipping.next(1, LARGE) is None  # the window is full
    shipping.acknowledge(0, ok=True)
    assert shipping.next(1, LARGE) == Shipment(1, 2, 4, LayerRange(0, 4))
    shipping.acknowledge(1, ok=True)
    assert shipping.next(1, LARGE) == Shipment(2, 6, 2, LayerRange(0, 3))
    shipping.acknowledge(2, ok=True)
    assert shipping.is_idle
    shipping.layers_are_ready(4)
    assert not shipping.is_idle
    assert shipping.next(1, LARGE) == Shipment(3, 6, 2, LayerRange(3, 4))
    assert shipping.is_idle


def test_few_layers_of_many_blocks_make_a_segment_as_large_as_many_layers_of_few() -> None:
    shipping = Shipping(num_blocks=12, num_layers=4)
    shipping.layers_are_ready(1)
    assert shipping.next(8, max_block_layers=8) == Shipment(0, 0, 8, LayerRange(0, 1))
    shipping.layers_are_ready(4)
    assert shipping.next(8, max_block_layers=8) == Shipment(1, 8, 4, LayerRange(0, 1))
    assert shipping.next(8, max_block_layers=8) == Shipment(2, 0, 2, LayerRange(1, 4))
    assert shipping.next(8, max_block_layers=1) == Shipment(3, 2, 1, LayerRange(1, 4))  # one block at least


def test_a_segment_that_is_refused_twice_is_sent_again_once() -> None:
    shipping = Shipping(num_blocks=1, num_layers=2)
    shipping.layers_are_ready(2)
    first = shipping.next(8, LARGE)
    shipping.acknowledge(0, ok=False)
    shipping.acknowledge(0, ok=False)
    assert not shipping.is_idle
    assert shipping.next(8, LARGE) == first
    assert shipping.next(8, LARGE) is None
    assert shipping.is_idle


@given(
    num_held=st.integers(0, 5),
    chunk_stops=st.lists(st.integers(0, 12), max_size=4).map(sorted),
    layer_stops=st.lists(st.integers(1, 5), max_size=4).map(sorted),
    max_block_layers=st.integers(1, 40),
    acknowledges=st.lists(st.booleans(), min_size=200, max_size=200),
)
def test_everything_missing_is_sent_once(
    num_held: int,
    chunk_stops: list[int],
    layer_stops: list[int],
    max_block_layers: int,
    acknowledges: list[bool],
) -> None:
    num_blocks, num_layers, window = 13, 5, 3
    shipping = Shipping(num_blocks, num_layers)
    shipments: list[Shipment] = []
    decisions = iter(acknowledges)

    def send_some() -> None:
        while next(decisions) and (shipment := shipping.next(window, max_block_layers)) is not None:
            shipments.append(shipment)
            if next(decisions):
                shipping.acknowledge(shipment.index, ok=True)

    shipping.skip(num_held)
    for stop in chunk_stops:
        shipping.blocks_are_ready(stop)
        send_some()
    for stop in [*layer_stops, num_layers]:
        shipping.layers_are_ready(stop)
        send_some()
    for shipment in shipments:
        shipping.acknowledge(shipment.index, ok=True)
    while (shipment := shipping.next(window, max_block_layers)) is not None:
        shipments.append(shipment)
        shipping.acknowledge(shipment.index, ok=True)

    assert shipping.is_idle
    assert [shipment.index for shipment in shipments] == list(range(shipping.num_segments))
    sent = [
        (block, layer)
        for shipment in shipments
        for block in range(shipment.first_block, shipment.first_block + shipment.num_blocks)
        for layer in range(shipment.layers.start, shipment.layers.stop)
    ]
    expected = [(block, layer) for block in range(num_held, num_blocks) for layer in range(num_layers)]
    assert sorted(sent) == expected
    whole = [shipment for shipment in shipments if len(shipment.layers) == num_layers]
    assert all(one.first_block <= other.first_block for one, other in pairwise(whole))
