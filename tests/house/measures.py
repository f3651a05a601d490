"""Print the sizes of the house: `make map`. What a training step goes through is found by running two of them."""

import ast
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

from tests.house.module_map import PACKAGES

ROOT = Path(__file__).parents[2]
_SMALL = 30


def modules() -> dict[str, Path]:
    """Every module of the packages that is not empty, by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.stat().st_size:
                name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                found[name.removesuffix(".__init__")] = path
    return found


def lines(paths: Any) -> int:
    """Lines of these files together."""
    return sum(path.read_text(encoding="utf-8").count("\n") for path in paths)


class Step:
    """The files of a training step, and the frames of ours above what its loss ends in."""

    def __init__(self) -> None:
        self.files: dict[Path, None] = {}
        self.loader_files: dict[Path, None] = {}
        self.frames: dict[str, int] = {}
        self._steps = 0

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        """Called by Python at every call of a function."""
        if event != "call":
            return
        code, path = frame.f_code, Path(frame.f_code.co_filename)
        if code.co_name == "plain_step":
            self._steps += 1
        # from the second step to the third: nothing is made for the first time, and nothing ends
        if self._steps != 2 or not _is_ours(path):
            return
        stack = [path]
        above = frame.f_back
        while above is not None:
            if _is_ours(Path(above.f_code.co_filename)):
                stack.append(Path(above.f_code.co_filename))
                if above.f_code.co_name == "train" and stack[-1].name == "loop.py":
                    break
            above = above.f_back
        is_loader = any("data" in each.relative_to(ROOT).parts[:2] for each in stack)
        (self.loader_files if is_loader else self.files)[path] = None
        for name, file, function in (
            ("objective", "sigmoid.py", "forward"),
            ("block", "block.py", "gradients_of"),
        ):
            if (path.name, code.co_name) == (file, function):
                self.frames.setdefault(name, len(stack))


def _is_ours(path: Path) -> bool:
    return path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in PACKAGES


def traced_step(folder: Path) -> Step:
    """Train three steps of the quickstart in this process, and watch the second."""
    from data_tools.cli import main as siglip_data
    from siglip_train.train import main as siglip_train

    step, arguments = Step(), sys.argv
    try:
        sys.argv = ["siglip-data", "make-tiny", str(folder / "tiny"), "--samples", "400", "--validation-samples",
                    "20", "--samples-per-class", "1"]  # fmt: skip
        siglip_data()
        sys.argv = ["siglip-train", "experiment=quickstart", "stop_after_steps=3", "evaluation.tasks=null",
                    "data.workers=0", "log.every_steps=100", f"run_dir={folder / 'run'}",
                    f"tokenizer={folder / 'tiny' / 'tokenizer.model'}",
                    *(f"data.sources.{name}.shards={folder / 'tiny' / 'train' / '*.tar'}" for name in _sources()),
                    ]  # fmt: skip
        threading.setprofile(step)
        sys.setprofile(step)
        siglip_train()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
        sys.argv = arguments
    return step


def _sources() -> list[str]:
    import yaml

    return list(yaml.safe_load((ROOT / "conf" / "data" / "tiny.yaml").read_text())["sources"])


def table(step: Step) -> list[tuple[str, str, str]]:
    """(what, measured, goal)."""
    found = modules()
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in found.items()}
    users: Counter[str] = Counter()
    for name, tree in trees.items():
        users.update({other for other in _imports(tree) if other in found and other != name})
    functions = [
        node.name for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
    ]
    private = sum(name.startswith("_") and not name.startswith("__") for name in functions)
    # a package that is a docstring alone names a room, and is no module to look into
    looked_into = [name for name, tree in trees.items() if len(tree.body) > 1]
    both = {**step.files, **step.loader_files}
    calls = Counter(call for tree in trees.values() for call in _calls(tree))
    readme = (ROOT / "README.md").stat().st_size
    return [
        ("files / lines of a training step", f"{len(both)} / {lines(both):,}", "32 / 4,800"),
        ("  without the loader", f"{len(step.files)} / {lines(step.files):,}", "20 / 2,700"),
        ("frames from loop.train to the objective", str(step.frames["objective"]), "5"),
        ("  to the block", str(step.frames["block"]), "8"),
        ("private functions", f"{private / len(functions):.0%} of {len(functions)}", "fewer than 42 %"),
        (
            "modules under 30 lines",
            str(sum(lines([found[name]]) < _SMALL for name in looked_into)),
            "fewer than 30",
        ),
        ("modules with one user", str(sum(users[name] == 1 for name in looked_into)), "fewer than 85"),
        ("lines of the report toolkit", f"{lines((ROOT / 'siglip_train' / 'report').glob('*.py')):,}", "800"),
        ("os.replace / flock", f"{calls['replace']} / {calls['flock']}", "one helper / none"),
        ("README.md", f"{readme / 1000:.1f} KB", "9 KB"),
        ("modules / lines", f"{len(found)} / {lines(found.values()):,}", "-"),
    ]


def _imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def _calls(tree: ast.AST) -> list[str]:
    """Calls of `os.replace` and `fcntl.flock`, by the name of the function."""
    return [
        node.func.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and (node.func.value.id, node.func.attr) in {("os", "replace"), ("fcntl", "flock")}
    ]


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        step = traced_step(Path(folder))
    print(f"\n{'':42} {'today':>20}  goal")
    for what, measured, goal in table(step):
        print(f"{what:42} {measured:>20}  {goal}")
    if "--files" in sys.argv:
        for path in (*step.files, "loader", *step.loader_files):
            print(path if isinstance(path, str) else f"  {path.relative_to(ROOT)} {lines([path])}")


if __name__ == "__main__":
    main()
