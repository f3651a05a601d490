"""The cost model: the hiding rule, the order of the forms in known places, and what must not be chosen."""

import pytest

from kernels.sigmoid_loss.exchange.cost_model import (
    PANEL_BYTES,
    Links,
    Plan,
    Sizes,
    bytes_sent,
    choose,
    panel_bytes,
    plans,
    seconds,
)

# a GPU whose launches cost nothing: what links and products alone allow
FREE_CALLS = Links(call=0)


def gpus(ranks, rows, ranks_per_node=8, width=768):
    return Sizes(ranks, min(ranks, ranks_per_node), rows, width, element=2, gradient_element=4)


def products(sizes, links):
    return 6 * sizes.rows**2 * sizes.ranks * sizes.width / links.flops


@pytest.mark.parametrize(("rows", "is_hidden"), [(1500, False), (1900, True)])
@pytest.mark.parametrize("width", [768, 1152])
def test_a_ring_within_a_node_hides_its_hops_from_1733_rows_on(rows, is_hidden, width):
    # rows >= flops / bandwidth: 780e12 / 450e9; the width cancels
    links = Links(call=0, inside_latency=0, between_latency=0)
    sizes = gpus(8, rows, width=width)
    time, least = seconds(Plan("ring"), sizes, links), products(sizes, links)
    # gradients of the last hop are two thirds of a hop, and hidden behind half a block
    assert (time <= 1.02 * least) == is_hidden


def test_between_nodes_a_flat_ring_needs_nine_times_as_many_rows():
    links = Links(call=0, inside_latency=0, between_latency=0)
    for rows, is_hidden in [(14000, False), (16000, True)]:
        sizes = gpus(64, rows)
        assert (seconds(Plan("ring"), sizes, links) <= 1.02 * products(sizes, links)) == is_hidden
    # a ring of rings: eight adapters a node instead of one
    sizes = gpus(64, 4000)
    assert seconds(Plan("node_ring"), sizes, links) <= 1.02 * products(sizes, links)


@pytest.mark.parametrize(
    ("ranks", "rows", "links", "form"),
    [
        (8, 4096, FREE_CALLS, "ring"),  # all hidden behind NVLink
        (64, 4096, FREE_CALLS, "node_ring"),
        (64, 1024, FREE_CALLS, "grid"),
        (512, 512, FREE_CALLS, "grid"),
        (2048, 16, Links(), "all_gather"),  # hops and launches cost more than pairs
        (4, 256, Links(), "all_gather"),
        (8, 4096, Links(flops=60e12), "ring"),  # fp32
    ],
)
def test_the_choice_in_known_places(ranks, rows, links, form):
    assert choose(gpus(ranks, rows), links).form == form


def test_the_choice_is_the_fastest_or_nearly():
    for ranks, rows in [(3, 100), (8, 512), (24, 2048), (64, 64), (256, 1024), (2048, 128)]:
        sizes = gpus(ranks, rows)
        allowed = [plan for plan in plans(sizes) if panel_bytes(plan, sizes) <= PANEL_BYTES]
        chosen = choose(sizes, Links())
        assert chosen in allowed
        assert seconds(chosen, sizes, Links()) <= 1.05 * min(
            seconds(plan, sizes, Links()) for plan in allowed
        )


def test_a_panel_that_is_too_large_is_not_chosen():
    # 2 x 131072 rows: an all-gather would save launches, for 2 GiB
    large = Sizes(2, 2, 131072, 768, 2, 4)
    assert panel_bytes(Plan("all_gather"), large) > PANEL_BYTES
    assert choose(large, Links(inside=1e15, inside_latency=0, call=1.0)).form == "ring"


def test_memory_and_bytes_of_the_forms():
    sizes = gpus(64, 1000)
    both = 1000 * 768 * (2 + 4)
    assert panel_bytes(Plan("node_ring"), sizes) == panel_bytes(Plan("ring"), sizes) == 0
    assert panel_bytes(Plan("grid", 8), sizes) * 8 == panel_bytes(Plan("all_gather"), sizes)
    assert bytes_sent(Plan("ring"), sizes) == bytes_sent(Plan("all_gather"), sizes) == 63 * both
    # 7 hops between nodes, 7 within each of 7 visits and of the two halves at home
    assert bytes_sent(Plan("node_ring"), sizes) == (7 + 9 * 7) * both
    assert bytes_sent(Plan("grid", 64), sizes) == 63 * both
    # a column of 8 nodes; a row of 8 ranks, and with each image gradient three doubles
    assert bytes_sent(Plan("grid", 8), sizes) == 14 * both + 7 * 24


def test_only_what_the_ranks_can_do_is_offered():
    assert [plan.form for plan in plans(gpus(7, 10))] == ["ring", "all_gather"]
    assert Plan("node_ring") not in plans(gpus(12, 10))
    assert {plan.grid_rows for plan in plans(gpus(24, 10)) if plan.form == "grid"} == {2, 3, 4, 6, 8, 12}


def scheduled(sizes, links):
    """Time of a ring whose messages follow one another, posted and waited for in the order of `round_trip`."""
    text, gradients = (
        links.between_latency + part / links.between for part in (sizes.block, sizes.gradients)
    )
    work = 6 * sizes.rows**2 * sizes.width / links.flops
    now = free = 0.0

    def post(duration):
        nonlocal free
        free = max(free, now) + duration
        return free

    arrival, back = post(text), 0.0
    now += links.call + work / 2
    for visit in range(1, sizes.ranks):
        now = max(now, arrival)
        if visit < sizes.ranks - 1:
            arrival = post(text)
        now = max(now + links.call + work, back)
        back = post(gradients)
    return max(now + links.call + work / 2, back)


@pytest.mark.parametrize("rows", [256, 2048, 4096, 8192, 16384, 65536])
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_the_trip_of_a_ring_takes_the_time_of_its_schedule(ranks, rows):
    sizes = Sizes(ranks, 1, rows, 768, 2, 4)
    assert seconds(Plan("ring"), sizes, Links()) == pytest.approx(scheduled(sizes, Links()), rel=0.02)
