"""Print every module with the first sentence of its docstring, and its lines: `make map`."""

import ast
from pathlib import Path
from typing import NamedTuple

PACKAGES = ("siglip_train", "kernels", "data_tools")


class Module(NamedTuple):
    """A module that is not empty. caption: the first line of its docstring, empty if it has none."""

    path: str
    lines: int
    caption: str


def module_map(root: Path) -> list[Module]:
    """Every module of the packages below `root`, folder by folder."""
    found = []
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py"), key=lambda path: (str(path.parent), path.name)):
            text = path.read_text(encoding="utf-8")
            docstring = ast.get_docstring(ast.parse(text)) or ""
            if text:
                caption = docstring.partition("\n")[0]
                found.append(Module(str(path.relative_to(root)), text.count("\n"), caption))
    return found


def main() -> None:
    """Print the map, folder by folder."""
    folder = Path()
    for module in module_map(Path(__file__).parents[2]):
        path = Path(module.path)
        if path.parent != folder:
            folder = path.parent
            print(f"\n{folder}/")
        print(f"  {path.name:28} {module.lines:4}  {module.caption}")


if __name__ == "__main__":
    main()
