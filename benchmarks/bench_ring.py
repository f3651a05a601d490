"""The loss over several ranks, by each form of exchange, against open_clip's four; and the cost model against both.

Ranks are gloo processes on this machine with one thread each: ratios within a case say something, times do not.
What the cost model predicts for 8 to 2,048 GPUs is printed, and drawn with `--save`.
"""

import argparse
from functools import partial
from statistics import median

from harness import RESULTS, finish, measure, rows
from ring_predictions import draw_predictions, prediction_table
from ring_ranks import FORMS, PEERS, Ranks, Run

from kernels.sigmoid_loss.exchange.cost_model import Links, Plan, Sizes, bytes_sent, seconds

# ranks, rows a rank, width: the same number of pairs a rank
CASES = [(2, 1024, 512), (4, 512, 512)]
HOP_BYTES = [2**12, 2**16, 2**18, 2**20, 2**21, 2**22]


def fit_links(ranks: Ranks, rows_a_rank: int, width: int, rounds: int) -> Links:
    """Two constants of the link from hops of several sizes round all ranks at once, two of a core from two blocks."""
    hops = {size: median(ranks.run(f"hop {size}").ms for _ in range(rounds)) / 1e3 for size in HOP_BYTES}
    latency = hops[HOP_BYTES[0]]
    # through the origin, beyond the smallest
    bandwidth = sum(size * size for size in HOP_BYTES[1:]) / sum(
        size * max(hops[size] - latency, 1e-9) for size in HOP_BYTES[1:]
    )
    small, large = (
        median(ranks.run(f"block {size}").ms for _ in range(rounds)) / 1e3 for size in (8, rows_a_rank)
    )
    flops = 6 * rows_a_rank**2 * width / (large - small)
    return Links(bandwidth, bandwidth, latency, latency, flops, small)


def compare(world: int, rows_a_rank: int, width: int, rounds: int) -> tuple[list, list[str]]:
    """All forms on so many ranks: rows, and notes on bytes, waiting and the model."""
    names = [name for name in (*FORMS, *PEERS) if name != "node_ring" or world > 2]
    case = f"{world} ranks n{rows_a_rank} E{width} float32"
    sizes = Sizes(world, 2 if world > 2 else world, rows_a_rank, width, 4, 4)
    with Ranks(world, rows_a_rank, width) as ranks:
        links = fit_links(ranks, rows_a_rank, width, rounds)
        runs: dict[str, list[Run]] = {name: [] for name in names}

        def contestant(name: str) -> float:
            runs[name].append(ranks.run(name))
            return runs[name][-1].ms

        measurements = measure({name: partial(contestant, name) for name in names}, rounds=rounds)
    notes = [
        f"{case}: {traffic(runs)}",
        f"{case}: hops of {links.inside / 1e6:.0f} MB/s and {1e3 * links.inside_latency:.2f} ms, blocks of "
        f"{links.flops / 1e9:.1f} GFLOP/s and {1e3 * links.call:.2f} ms, measured with all ranks at once",
        f"{case}: {check_of_the_model(sizes, links, runs)}",
    ]
    return rows("ring", case, "ms/loss", measurements, {}), notes


def traffic(runs: dict[str, list[Run]]) -> str:
    """What a rank sends, and the share of its time that it waits."""
    found = [
        f"{name} {median(run.sent for run in runs[name]) / 2**20:.2f}, "
        f"{100 * median(run.waited / run.ms for run in runs[name]):.0f} %"
        for name in runs
    ]
    return f"MiB sent by a rank and share of the time waited: {'; '.join(found)}"


def check_of_the_model(sizes: Sizes, links: Links, runs: dict[str, list[Run]]) -> str:
    """What the model predicts with the constants fitted here, beside what was measured."""
    found = []
    for name, exchange in FORMS.items():
        if name in runs and exchange.dtype is None:
            plan = Plan(exchange.form, 2 if exchange.form == "grid" else 0)
            predicted, measured = 1e3 * seconds(plan, sizes, links), median(run.ms for run in runs[name])
            found.append(
                f"{name} {predicted:.1f} and {measured:.1f} ms ({measured / predicted:.2f} x), "
                f"{bytes_sent(plan, sizes) / 2**20:.2f} and {median(run.sent for run in runs[name]) / 2**20:.2f} MiB"
            )
    return f"the model's and the measured: {'; '.join(found)}"


def main() -> None:
    """Compare on 2 and 4 ranks, then predict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--save", action="store_true", help="keep rows, report and predictions in results/")
    parser.add_argument("--only-predict", action="store_true", help="print what the cost model says and end")
    arguments = parser.parse_args()
    if not arguments.only_predict:
        table, notes = [], ["gloo over this machine's loopback, one thread a rank; loss with all gradients"]
        for world, rows_a_rank, width in CASES:
            found, said = compare(world, rows_a_rank, width, arguments.rounds)
            table += found
            notes += said
        finish(table, dict.fromkeys([*FORMS, *PEERS[1:]], PEERS[0]), notes, save=arguments.save)
    print(prediction_table())
    if arguments.save:
        path = RESULTS / "ring_model.md"
        path.write_text(prediction_table() + "\n\n![times by number of GPUs](ring_model.svg)\n")
        draw_predictions(RESULTS / "ring_model.svg")
        print(f"kept in {path}")


if __name__ == "__main__":
    main()
