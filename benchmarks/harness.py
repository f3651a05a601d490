"""Time contestants side by side, record the machine, append rows to `results/<theme>.csv`, print ratios.

Every round runs every contestant once, in a new order, so that a slow minute of the machine hurts all alike.
"""

import csv
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
# from here on the others on the machine may explain a difference
CONTENDED_CORES = 0.15


@dataclass
class Row:
    """One contestant in one case. `p20`, `p50`, `p80` are in `unit`; the rest says where that was."""

    theme: str
    case: str
    contestant: str
    unit: str
    p20: float
    p50: float
    p80: float
    rounds: int
    memory_mb: float  # peak of the process (CPU) or of the allocator (CUDA); 0 = not measured
    others_cores: float  # cores that other processes kept busy meanwhile
    date: str
    revision: str
    hardware: str
    threads: int
    python: str
    torch: str
    triton: str


@dataclass(frozen=True)
class Measurement:
    """Values of one contestant, a round each, and the cores that others used meanwhile."""

    values: list[float]
    others_cores: float

    def quantile(self, share: float) -> float:
        """Linear between the values, as numpy's default."""
        ordered = sorted(self.values)
        position = share * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def measure(
    contestants: Mapping[str, Callable[[], float]], *, rounds: int, warmup: int = 1
) -> dict[str, Measurement]:
    """Run every contestant `warmup + rounds` times, interleaved; each returns the value to record."""
    names = list(contestants)
    values: dict[str, list[float]] = {name: [] for name in names}
    others: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            watch = _OtherProcesses()
            value = contestants[name]()
            if turn >= warmup:
                values[name].append(value)
                others[name].append(watch.cores())
    return {name: Measurement(values[name], sum(others[name]) / max(rounds, 1)) for name in names}


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call, to the end of its work on the device."""
    _synchronize(device)
    start = time.perf_counter()
    run()
    _synchronize(device)
    return (time.perf_counter() - start) * 1e3


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run_child(arguments: Sequence[str]) -> str:
    """Run this interpreter with `arguments` in a process of its own and return what it prints."""
    return subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, check=True).stdout


def peak_resident_memory() -> float:
    """Peak resident memory of this process in MB.

    From /proc, because getrusage starts a child with the peak of its parent.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def reset_peak_resident_memory() -> None:
    """Let the peak begin anew at what this process holds now."""
    Path("/proc/self/clear_refs").write_text("5")


def cuda_memory_mb(run: Callable[[], object]) -> float:
    """Peak of CUDA's allocator in a run, beside what was there."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def rows(
    theme: str, case: str, unit: str, measurements: Mapping[str, Measurement], memory: Mapping[str, float]
) -> list[Row]:
    """Measurements as rows of the results."""
    return [
        Row(
            theme=theme,
            case=case,
            contestant=name,
            unit=unit,
            p20=round(measurement.quantile(0.2), 3),
            p50=round(measurement.quantile(0.5), 3),
            p80=round(measurement.quantile(0.8), 3),
            rounds=len(measurement.values),
            memory_mb=round(memory.get(name, 0.0)),
            others_cores=round(measurement.others_cores, 2),
            threads=torch.get_num_threads(),
            **environment(),
        )
        for name, measurement in measurements.items()
    ]


@cache
def environment() -> Mapping[str, str]:
    """Date, revision, hardware and versions, as columns of a row."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "revision": _revision(),
        "hardware": hardware(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
    }


def hardware() -> str:
    """The GPU if there is one, else the CPU and the cores this process may use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    models = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{models[0] if models else platform.machine()} x{len(os.sched_getaffinity(0))}"


def append(table: Sequence[Row]) -> Path:
    """Append rows to `results/<theme>.csv`; what is there stays."""
    path = RESULTS / f"{table[0].theme}.csv"
    names = [field.name for field in fields(Row)]
    is_new = not path.exists()
    if not is_new and path.read_text().splitlines()[0] != ",".join(names):
        raise ValueError(f"{path} has other columns: start a new theme or move it away")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(asdict(row) for row in table)
    return path


def ratio_table(table: Sequence[Row], baselines: Mapping[str, str]) -> str:
    """A Markdown table; `baselines` names, for a contestant, the one it is compared with in its case.

    The last column is how many times as fast as the baseline (more is better for every unit).
    """
    medians = {(row.case, row.contestant): row.p50 for row in table}
    lines = [
        "| case | contestant | p20 | p50 | p80 | unit | memory MB | others' cores | times as fast |",
        "|---|---|--:|--:|--:|---|--:|--:|---|",
    ]
    for row in table:
        baseline = baselines.get(row.contestant)
        ratio = ""
        if (row.case, baseline) in medians:
            quotient = row.p50 / medians[row.case, str(baseline)]
            faster = 1 / quotient if row.unit.startswith("ms") else quotient
            ratio = f"{faster:.2f} x {baseline}"
        busy = f"{row.others_cores:.2f}{' !' if row.others_cores > CONTENDED_CORES else ''}"
        lines.append(
            f"| {row.case} | {row.contestant} | {row.p20:.5g} | {row.p50:.5g} | {row.p80:.5g} | {row.unit} "
            f"| {row.memory_mb:.0f} | {busy} | {ratio} |"
        )
    if any(row.others_cores > CONTENDED_CORES for row in table):
        lines.append("\n`!`: other processes were at work; run again on a quiet machine.")
    return "\n".join(lines)


def write_report(
    table: Sequence[Row],
    baselines: Mapping[str, str],
    notes: Sequence[str],
    draw: Callable[[Path], None] | None = None,
) -> Path:
    """Write `results/<theme>_<hardware>_<yyyymm>.md`: the table of this run, its machine, its notes and its plot."""
    first = table[0]
    name = "-".join("".join(c if c.isalnum() else " " for c in first.hardware).split()).lower()
    path = RESULTS / f"{first.theme}_{name}_{first.date[:7].replace('-', '')}.md"
    head = [
        f"# {first.theme} on {first.hardware}",
        "",
        f"{first.date}, revision {first.revision}, torch {first.torch}, triton {first.triton}, Python {first.python}, "
        f"{first.threads} threads.",
        "",
    ]
    if draw is not None:
        draw(path.with_suffix(".svg"))
        head += [f"![{first.theme}]({path.stem}.svg)", ""]
    path.write_text(
        "\n".join([*head, ratio_table(table, baselines), "", *(f"- {note}" for note in notes), ""])
    )
    return path


def shares_of_products(table: Sequence[Row]) -> list[str]:
    """A note for each case: how near each contestant comes to the speed of the one called "products"."""
    notes = []
    for case in dict.fromkeys(row.case for row in table):
        times = {row.contestant: row.p50 for row in table if row.case == case}
        ceiling = times.pop("products")
        shares = ", ".join(f"{name} {ceiling / time:.2f}" for name, time in times.items())
        notes.append(f"share of the products' speed at {case}: {shares}")
    return notes


def finish(
    table: Sequence[Row],
    baselines: Mapping[str, str],
    notes: Sequence[str],
    *,
    save: bool,
    draw: Callable[[Path], None] | None = None,
) -> None:
    """Print the ratios; with `save`, keep the rows and the report, and what `draw` writes to a path beside it."""
    print(ratio_table(table, baselines))
    for note in notes:
        print(f"- {note}")
    if save:
        print(f"kept in {append(table)} and {write_report(table, baselines, notes, draw)}")


class _OtherProcesses:
    """Counts the cores that processes other than this one and its children keep busy."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.machine = _machine_seconds()
        self.own = tree_cpu_seconds()

    def cores(self) -> float:
        elapsed = time.perf_counter() - self.start
        busy = _machine_seconds() - self.machine
        # /proc counts in ticks of 10 ms: over a short call this may fall below zero
        return max(0.0, (busy - (tree_cpu_seconds() - self.own)) / elapsed)


def _machine_seconds() -> float:
    # without idle and iowait; with steal, the time the hypervisor gave to someone else
    user, nice, system, _, _, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def tree_cpu_seconds(pid: int | None = None) -> float:
    """CPU seconds so far of a process (default: this one) and of all below it, ended ones included."""
    ticks = 0
    for process in tree_processes(pid):
        with suppress(OSError):  # it ended meanwhile
            # after the command name, which may hold spaces: fields 14 to 17 are its own time and its ended children's
            values = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[11:15]
            ticks += sum(map(int, values))
    return ticks / os.sysconf("SC_CLK_TCK")


def tree_processes(pid: int | None = None) -> list[int]:
    """A process (default: this one) and all below it."""
    pid = pid or os.getpid()
    below: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            below += map(int, (task / "children").read_text().split())
    return [pid, *(process for child in below for process in tree_processes(child))]


def _revision() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(HERE), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    return commit + ("-dirty" if git("status", "--porcelain", "-uno") else "")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
