"""Class names and prompt templates of zero-shot classification: read, checked, filled in."""

import string
from collections.abc import Sequence

from siglip_train.errors import UserError
from siglip_train.files.atomic import read_text

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def canonicalise(text: str) -> str:
    """Lower the case, turn `_` into a space, drop punctuation, collapse spaces: big_vision's rule."""
    return " ".join(text.replace("_", " ").translate(_WITHOUT_PUNCTUATION).lower().split())


def read_class_names(names: str | Sequence[str]) -> list[str]:
    """Give the class names in label order.

    names: a list, a file with one name a line, or "imagenet" for the 1,000 names curated by CLIP's authors.
    Raises UserError where the file is missing or a name is empty.
    """
    if names == "imagenet":
        # imported here because open_clip takes seconds to import and few evaluations need its lists
        from open_clip import IMAGENET_CLASSNAMES

        return list(IMAGENET_CLASSNAMES)
    return _checked(_read_lines(names, "class names"), names, "class name")


def read_templates(templates: str | Sequence[str]) -> list[str]:
    """Give the prompt templates, each with one place for the name: `{c}` or `{}`.

    templates: a list, a file with one template a line, or "openai" for CLIP's 80 ImageNet templates.
    Raises UserError where the file is missing or a template has no such place.
    """
    if templates == "openai":
        from open_clip import OPENAI_IMAGENET_TEMPLATES  # here for the same reason as above

        return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
    lines = _checked(_read_lines(templates, "templates"), templates, "template")
    for line in lines:
        if "{c}" not in line and "{}" not in line:
            raise UserError(
                f"template {line!r} has no place for the class name: write {{c}} or {{}} where it belongs"
            )
    return lines


def fill(template: str, name: str) -> str:
    """Put the class name into the template; braces elsewhere stay as they are."""
    return template.replace("{c}" if "{c}" in template else "{}", name)


def _read_lines(source: str | Sequence[str], what: str) -> list[str]:
    if not isinstance(source, str):
        return list(source)
    try:
        text = read_text(source)
    except UserError as error:
        raise UserError(f"the {what}: {error}; it is a text file with one a line") from None
    return text.rstrip().split("\n") if text.strip() else []


def _checked(lines: list[str], source: str | Sequence[str], what: str) -> list[str]:
    where = f"in {source}" if isinstance(source, str) else "in the list"
    lines = [line.strip() for line in lines]
    if not lines:
        raise UserError(f"no {what} {where}: give one a line")
    if "" in lines:
        # a blank line would shift the label of every later class
        raise UserError(f"empty {what} at line {lines.index('') + 1} {where}: remove it or name it")
    return lines
