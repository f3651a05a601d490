"""Pages and drawings from templates: every text is escaped, a value that is missing is an error, nothing is fetched."""

from functools import cache
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from siglip_train.report.numbers import percent, short


def render(name: str, *, package: str = "siglip_train.report", **values: Any) -> Markup:
    """Fill a template of `package`, which may extend and import those of this package."""
    return Markup(_environment(package).get_template(name).render(values))


@cache
def _environment(package: str) -> Environment:
    loaders = [PackageLoader(name) for name in dict.fromkeys((package, "siglip_train.report"))]
    environment = Environment(
        loader=ChoiceLoader(loaders),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": "{:,}".format,
        "decimals": lambda value, places: "nan" if value is None else f"{value:.{places}f}",
        "embedded": embedded,
        "percent": percent,
        "pixels": "{:.1f}".format,
        "short": short,
    }
    return environment


def embedded(url: str) -> str:
    """Give the address of an image that lies inside the page, and nothing for any other: a page must never fetch."""
    return url if url.startswith("data:image/") else ""
