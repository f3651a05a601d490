"""What the cost model of the exchange says for 8 to 2,048 GPUs: as a table and as a plot."""

from pathlib import Path

from drawing import drawn

from kernels.sigmoid_loss.exchange.cost_model import Links, Plan, Sizes, choose, plans, seconds

GPUS = [8, 16, 32, 64, 128, 256, 512, 1024, 2048]
WIDTH = 768
# title, rows a GPU
CASES = [
    ("1,024 pairs a GPU", lambda _: 1024),
    ("a global batch of 32,768", lambda gpus: 32768 // gpus),
    ("a global batch of 1,048,576", lambda gpus: 1048576 // gpus),
]
COLUMNS = ["ring", "node_ring", "best grid", "all_gather"]


def prediction_table() -> str:
    """Markdown: milliseconds of the loss with its gradients, by number of GPUs and form."""
    lines = [
        f"Predicted milliseconds of the loss with its gradients: bf16, width {WIDTH}, nodes of 8, speeds of `Links()`: "
        f"{Links()}.",
    ]
    for title, rows in CASES:
        lines += [
            f"\n{title}:\n",
            "| GPUs | rows a GPU | products alone | ring | node_ring | best grid | all_gather | chosen |",
            "|--:|--:|--:|--:|--:|--:|--:|---|",
        ]
        lines += [_line(gpus, rows(gpus)) for gpus in GPUS]
    return "\n".join(lines)


def _sizes(gpus: int, rows: int) -> Sizes:
    return Sizes(gpus, 8, rows, WIDTH, element=2, gradient_element=4)


def _products(gpus: int, rows: int) -> float:
    return 6e3 * rows * rows * gpus * WIDTH / Links().flops


def times(sizes: Sizes) -> dict[str, tuple[float, Plan]]:
    """Milliseconds and plan by column; of the grids, the fastest. Forms that these GPUs do not have are left out."""
    found: dict[str, tuple[float, Plan]] = {}
    for plan in plans(sizes):
        name = "best grid" if plan.form == "grid" else plan.form
        found[name] = min(found.get(name, (float("inf"), plan)), (1e3 * seconds(plan, sizes, Links()), plan))
    return found


def _line(gpus: int, rows: int) -> str:
    sizes = _sizes(gpus, rows)
    found = times(sizes)
    cells = [f"{found[name][0]:.3g}" if name in found else "" for name in COLUMNS]
    best = found["best grid"][1].grid_rows
    cells[2] += f" ({best} x {gpus // best})"
    chosen = choose(sizes, Links())
    shape = f" {chosen.grid_rows} x {gpus // chosen.grid_rows}" if chosen.grid_rows else ""
    return f"| {gpus} | {rows} | {_products(gpus, rows):.3g} | {' | '.join(cells)} | {chosen.form}{shape} |"


def draw_predictions(path: Path) -> None:
    """Draw the table, a panel a case, on logarithmic axes."""
    with drawn(path, columns=len(CASES), size=(14, 4.2)) as (panels,):
        for panel, (title, rows) in zip(panels, CASES, strict=True):
            found = {gpus: times(_sizes(gpus, rows(gpus))) for gpus in GPUS}
            for name in COLUMNS:
                points = [(gpus, found[gpus][name][0]) for gpus in GPUS if name in found[gpus]]
                panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
            panel.plot(
                GPUS,
                [_products(gpus, rows(gpus)) for gpus in GPUS],
                "k:",
                linewidth=1,
                label="products alone",
            )
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_title(title, fontsize=10)
            panel.set_xlabel("GPUs")
            panel.grid(alpha=0.3)
        panels[0].set_ylabel("ms, predicted")
        panels[-1].legend(fontsize=8)
