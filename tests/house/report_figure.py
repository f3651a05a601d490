"""Draw the figure of the READMEs from a report: `python -m tests.house.report_figure REPORT.html OUT.svg`.

A README cannot show HTML, so two charts and a few retrieved images of the page become one SVG with its own styles.
"""

import re
import sys
from collections.abc import Sequence
from html import escape, unescape
from pathlib import Path

CHARTS = ("training loss", "retrieval: image_retrieval_recall")
LANGUAGES = ("en", "de", "zh")
STYLE = """
text { font: 11.5px system-ui, "Segoe UI", "Noto Sans", sans-serif; fill: #667085; }
.title { font-size: 15px; font-weight: 600; fill: #1b2330; } .query { font-size: 13.5px; fill: #1b2330; }
.grid { stroke: #e4e7ec; } .axis, .tick { stroke: #667085; }
path { fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linejoin: round; } circle { fill: currentColor; }
.c0 { color: #2f6fde; } .c1 { color: #e2703a; } .c2 { color: #1e9d74; }
.right { fill: none; stroke: #1e9d74; stroke-width: 3; }
"""
WIDTH, CHART, THUMBNAIL, STEP = 1060, 520, 84, 94
TOP, ROW = 330, 108


def figure(page: str, charts: Sequence[str] = CHARTS, languages: Sequence[str] = LANGUAGES) -> str:
    """Give an SVG with charts of a run's page, and what the run retrieved for a caption of each language."""
    parts = [_chart(page, title, 10 + place * (CHART + 10)) for place, title in enumerate(charts)]
    queries = dict(
        re.findall(r'<p dir="auto"><b class="language">(\w+)</b> (.*?</div>)', page, re.DOTALL)[::-1]
    )
    parts += [_text(10, TOP - 16, "Images found for a caption (framed: the right one)", "title")]
    parts += [_query(language, queries[language], TOP + row * ROW) for row, language in enumerate(languages)]
    height = TOP + len(languages) * ROW
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">'
        f'<style>{STYLE}</style><rect width="{WIDTH}" height="{height}" fill="#ffffff"/>{"".join(parts)}</svg>\n'
    )


def _chart(page: str, title: str, left: int) -> str:
    start = page.index(f"<figcaption>{title}")
    drawing, legend = page[start : page.index("</figure>", start)].split("</svg>")
    inner = drawing.partition("<svg")[2].partition(">")[2]
    # what shows under a pointer only
    inner = re.sub(r'<g class="hover">.*?</g>|<title>.*?</title>', "", inner, flags=re.DOTALL)
    names = re.findall(r'<i class="(c\d)"></i>(?:\S*_)?(.*?) <b>(.*?)</b>', legend)
    keys = [
        f'<g class="{colour}"><path d="M{x} 282h14"/>{_text(x + 20, 286, f"{name} {value}")}</g>'
        for x, (colour, name, value) in zip(range(56, CHART, 130), names, strict=False)
    ]
    moved = f'<g transform="translate(0 28)">{inner}</g>'
    return f'<g transform="translate({left} 0)">{_text(0, 20, title, "title")}{moved}{"".join(keys)}</g>'


def _query(language: str, found: str, top: int) -> str:
    caption = unescape(found.partition("</p>")[0])
    images = re.findall(
        r'<figure( class="right")?.*?src="(.*?)".*?<figcaption dir="auto">(.*?)<', found, re.DOTALL
    )
    parts = [_text(10, top + 46, f"{language}: {caption}", "query")]
    for place, (is_right, url, score) in enumerate(images):
        left = 400 + place * STEP
        parts += [
            f'<image x="{left}" y="{top}" width="{THUMBNAIL}" height="{THUMBNAIL}" href="{url}"/>',
            _text(left + THUMBNAIL / 2 - 10, top + THUMBNAIL + 14, score),
        ]
        if is_right:
            parts.append(
                f'<rect class="right" x="{left}" y="{top}" width="{THUMBNAIL}" height="{THUMBNAIL}" rx="6"/>'
            )
    return "".join(parts)


def _text(x: float, y: float, words: str, style: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{style}">{escape(words)}</text>'


if __name__ == "__main__":
    report, out = map(Path, sys.argv[1:])
    out.write_text(figure(report.read_text(encoding="utf-8")), encoding="utf-8")
