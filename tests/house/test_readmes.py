"""What READMEs say: the first one stays short, links lead somewhere, figures are those of the rows, commands exist."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

import pytest

from siglip_train.report import write_report
from tests.conftest import ROOT
from tests.house.commands import readmes
from tests.house.report_figure import figure
from tests.report.fake_run import write_fake_run

RESULTS = ROOT / "benchmarks" / "results"
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# composed or parsed by test_commands.py; what its words mean to a shell does not matter here
OURS = re.compile(r"(torchrun .*-m siglip_train\.|siglip-(train|eval|convert|data)\b)")
# ran by hand, or against stand-ins of their stores (tests/data_tools/test_recipes.py)
BY_HAND = re.compile(
    r"(source|pip install|wget|img2dataset|hf|npm|git clone|unzip|tar|mkdir|cd|for|\(printf|cat|head|tail)\b"
)
# shown as text to save, and run as a whole by tests/faults/test_slurm_script.py
SCRIPT = "#!/bin/bash"


def prose(file: Path) -> str:
    return FENCED.sub("", file.read_text())


def test_the_first_readme_is_read_in_minutes() -> None:
    text = (ROOT / "README.md").read_bytes()
    assert len(text) <= 9000
    assert max(map(len, text.decode().splitlines())) <= 260


def anchors(file: Path) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.*)$", prose(file), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("file", readmes(), ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_to_files_and_to_headings(file: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(file)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = file.parent / path if path else file
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_every_readme_is_reached_from_the_first() -> None:
    found: set[Path] = set()
    waiting = [ROOT / "README.md"]
    while waiting:
        file = waiting.pop()
        if file in found or file.suffix != ".md":
            continue
        found.add(file)
        links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", prose(file))]
        waiting += [(file.parent / link).resolve() for link in links if link and "://" not in link]
    missing = {file for file in readmes() if file.name == "README.md"} - found
    assert not missing


def commands(file: Path) -> list[str]:
    """The command lines of fenced blocks: those after `$`, else those of a block that begins with a command."""
    found = []
    for language, block in FENCED.findall(file.read_text()):
        lines = block.replace("\\\n", " ").splitlines()
        shown = [line[2:] for line in lines if line.startswith("$ ")]
        rest = [line for line in lines if line and not line.startswith(("#", " "))]
        if not shown and rest and not language and (is_known(rest[0]) or ".." in rest[0][:5]):
            shown = rest
        # output that stands below the command of an example without `$` begins with the time
        found += [line for line in shown if not re.match(r"[\d:]{8} ", line)]
    return found


def is_known(line: str) -> bool:
    made = re.match(r"make ([\w-]+)", line)
    if made:
        return bool(re.search(rf"^{made[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE))
    chain = re.match(r"siglip-recipe ([\w-]+) ", line)
    if chain:
        # its stages are composed in tests/test_recipe.py
        return (ROOT / "conf" / "recipe" / f"{chain[1]}.yaml").exists()
    script = re.match(r"python (-m )?([\w./]+)", line)
    if script:
        path = ROOT / (script[2].replace(".", "/") if script[1] else script[2])
        return path.exists() or path.with_suffix(".py").exists() or script[2] == "pytest"
    return bool(OURS.match(line) or BY_HAND.match(line))


@pytest.mark.parametrize("file", readmes(), ids=lambda file: str(file.relative_to(ROOT)))
def test_every_shown_command_is_there_to_be_run(file: Path) -> None:
    inline = re.findall(r"`((?:make|python) [^`]+)`", prose(file))
    unknown = [line for line in [*commands(file), *inline] if not is_known(line)]
    assert unknown == []


class Row(NamedTuple):
    """A row of a table beside open_clip."""

    case: str
    report: str
    unit: str
    numbers: list[str]


def rows(file: Path) -> list[Row]:
    cells = [line.strip().strip("|").split("|") for line in file.read_text().splitlines() if line[:2] == "| "]
    found = []
    for _, case, *rest in ([cell.strip() for cell in row] for row in cells if len(row) > 4):
        link = re.fullmatch(r"\[`(.*)`\]\((?:benchmarks/)?results/(.*\.md)\)", case)
        if link:
            found.append(Row(link[1], link[2], rest[0], [cell for cell in rest[1:] if cell]))
    return found


def measured(row: Row) -> list[tuple[str, float, float]]:
    """(contestant, median, memory) of the rows of the case."""
    lines = [line.strip("|").split("|") for line in (RESULTS / row.report).read_text().splitlines()]
    cells = [[cell.strip() for cell in line] for line in lines if len(line) == 9]
    return [(line[1], float(line[3]), float(line[6])) for line in cells if line[0] == row.case]


def shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


@pytest.mark.parametrize("name", ["README.md", "benchmarks/README.md"])
def test_figures_beside_open_clip_are_those_of_the_rows(name: str) -> None:
    table = rows(ROOT / name)
    assert len(table) > 6
    for row in table:
        both = [
            (ours, theirs)
            for ours in measured(row)
            for theirs in measured(row)
            if ours[0].startswith("ours") and theirs[0].startswith("open_clip")
        ]
        assert both, row
        assert row.numbers in [wanted(row, ours, theirs) for ours, theirs in both], row


def test_figures_of_reading_by_offset_are_those_of_the_rows() -> None:
    table = re.findall(
        r"\[`(.*?)`\]\(\S*/(reading_.*?\.md)\) \|(.*)\|", (ROOT / "siglip_train/data/README.md").read_text()
    )
    assert len(table) == 3
    for case, report, cells in table:
        medians = {name: f"{median:,.0f}" for name, median, _ in measured(Row(case, report, "", []))}
        _, *rates, _ = [cell.strip() for cell in cells.split("|")]
        assert rates == [medians[name] for name in ("ours", "webdataset", "index")]


def wanted(row: Row, ours: tuple, theirs: tuple) -> list[str]:
    (_, median, memory), (_, their_median, their_memory) = ours, theirs
    memories = [f"{number:,.0f}" if number else "–" for number in (memory, their_memory)]
    if row.unit == "peak MB":
        return memories
    ratio = median / their_median if "per CPU second" in row.unit else their_median / median
    figures = [shown(median), shown(their_median), f"{ratio:.2f}"]
    return figures if len(row.numbers) == 3 else figures + memories


def test_the_figure_is_drawn_from_a_report(tmp_path: Path) -> None:
    write_fake_run(tmp_path / "run")
    page = write_report(tmp_path / "run").read_text()
    drawn = ElementTree.fromstring(figure(page, ("training loss", "scenes: image_retrieval_recall"), ("de",)))
    images = drawn.findall(".//{*}image")
    assert images
    assert all(image.attrib["href"].startswith("data:image/") for image in images)
    assert len(drawn.findall(".//{*}path")) > 4


def test_the_figure_of_the_readme_is_an_svg_of_a_few_kilobytes() -> None:
    file = ROOT / "siglip_train" / "report" / "quickstart.svg"
    assert file.stat().st_size < 200_000
    assert ElementTree.parse(file).getroot().tag.endswith("svg")
    for name in ("README.md", "siglip_train/report/README.md"):
        assert "quickstart.svg)" in (ROOT / name).read_text()
