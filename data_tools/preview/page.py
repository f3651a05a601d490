"""The page around the samples: one file that needs nothing beside it, light and dark, from phone to wide screen."""

from collections.abc import Sequence
from html import escape

_STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1b2330; --soft: #667085; --rule: #e4e7ec; --fault: #b42318;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #11151b; --card: #1a2029; --ink: #e6e9ee; --soft: #97a1b0; --rule: #2c3542; --fault: #ff8a7a;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.45 system-ui, "Noto Sans", sans-serif; }
main { max-width: 1400px; margin: 0 auto; padding: 24px 16px 48px; }
h1 { font-size: 22px; margin: 0 0 4px; overflow-wrap: anywhere; }
header p { margin: 0; color: var(--soft); }
label { margin-right: 16px; white-space: nowrap; }
.cards {
  display: grid; gap: 16px; margin-top: 18px; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(260px, 100%), 1fr));
}
figure { margin: 0; padding: 12px; background: var(--card); border: 1px solid var(--rule); border-radius: 12px; }
.frame { position: relative; margin: 0 auto; overflow: hidden; border-radius: 6px; }
.frame > * { position: absolute; inset: 0; width: 100%; height: 100%; }
.crisp, .mask { image-rendering: pixelated; }
.mask { opacity: 0.5; }
.boxes rect { fill: none; stroke-width: 2; vector-effect: non-scaling-stroke; }
.boxes text { font-weight: 600; paint-order: stroke; stroke: #000; stroke-width: 0.25em; stroke-linejoin: round; }
body:has(#boxes:not(:checked)) .boxes, body:has(#masks:not(:checked)) .mask { display: none; }
figcaption p { margin: 8px 0 0; overflow-wrap: anywhere; }
.language { padding: 0 6px; border: 1px solid var(--rule); border-radius: 6px; color: var(--soft);
  font-size: 12px; font-weight: 400; }
.place, .legend { color: var(--soft); font-size: 12.5px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 12px; margin: 8px 0 0; }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 5px; }
.fault { color: var(--fault); font-weight: 600; }
"""


def page(title: str, cards: Sequence[str]) -> str:
    """The HTML of all; `cards` are HTML, `title` is text."""
    body = "".join(cards)
    switches = "".join(
        f'<label><input type="checkbox" id="{layer}" checked> {layer}</label>'
        for layer, mark in (("boxes", 'class="boxes"'), ("masks", 'class="mask"'))
        if mark in body
    )
    title = escape(title)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head>"
        f"<body><main><header><h1>{title}</h1><p>{len(cards)} random samples {switches}</p></header>"
        f'<div class="cards">{body}</div></main></body></html>\n'
    )
