"""The style sheets of pages: light and dark, no fonts or files from elsewhere."""

# of every page: those of the data tools begin with it too
BASE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1b2330; --soft: #667085; --rule: #e4e7ec; --accent: #2f6fde;
}
@media (prefers-color-scheme: dark) {
  :root { --page: #11151b; --card: #1a2029; --ink: #e6e9ee; --soft: #97a1b0; --rule: #2c3542; --accent: #6ea2ff; }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "Noto Sans", sans-serif;
}
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 14px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 0 0 14px; }
small { color: var(--soft); font-weight: 400; font-size: 12.5px; }
section {
  background: var(--card); border: 1px solid var(--rule); border-radius: 12px;
  padding: 20px 22px; margin: 18px 0;
}
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 0; }
.tiles div {
  background: var(--card); border: 1px solid var(--rule); border-radius: 12px;
  padding: 10px 18px; min-width: 132px;
}
.tiles dt { color: var(--soft); font-size: 12.5px; }
.tiles dd { margin: 0; font-size: 22px; font-weight: 600; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(460px, 100%), 1fr)); gap: 22px; }
figure { margin: 0; }
.chart figcaption { font-weight: 600; margin-bottom: 4px; }
.chart svg { display: block; width: 100%; height: auto; }
.chart text { fill: var(--soft); font-size: 11.5px; font-variant-numeric: tabular-nums; }
.chart .grid { stroke: var(--rule); }
.chart .axis, .chart .tick { stroke: var(--soft); }
.scroll { overflow-x: auto; margin: 8px 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 16px 4px 0; text-align: start; }
thead th { color: var(--soft); font-weight: 500; font-size: 13px; white-space: nowrap; }
tbody tr { border-top: 1px solid var(--rule); }
.number { text-align: end; white-space: nowrap; }
.language {
  background: var(--page); border: 1px solid var(--rule); border-radius: 6px; padding: 0 7px;
  font-size: 12px; color: var(--soft);
}
"""

STYLE = (
    BASE
    + """
:root {
  --c0: #2f6fde; --c1: #e2703a; --c2: #1e9d74; --c3: #b5499c; --c4: #c29a1c; --c5: #5d57c8;
  --c6: #3aa3c4; --c7: #8a6d5b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --c0: #6ea2ff; --c1: #ff9a6b; --c2: #4fd0a5; --c3: #e58bd0; --c4: #e6c65c; --c5: #a7a2ff;
    --c6: #73cfea; --c7: #c2a794;
  }
}
h3 { font-size: 18px; margin: 0 0 12px; }
h4 { font-size: 15px; margin: 22px 0 8px; }
body main > details {
  background: var(--card); border: 1px solid var(--rule); border-radius: 12px;
  padding: 20px 22px; margin: 18px 0;
}
summary { cursor: pointer; font-weight: 600; }
pre {
  overflow-x: auto; font: 12.5px/1.5 ui-monospace, "DejaVu Sans Mono", monospace;
  margin: 12px 0 0;
}

section .tiles { gap: 8px; margin-bottom: 10px; }
section .tiles div { background: var(--page); padding: 6px 14px; min-width: 0; }
section .tiles dd { font-size: 17px; }

.chart path { fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linejoin: round; }
.chart circle { fill: currentColor; }
.chart .hover circle { opacity: 0; }
.chart .hover circle:hover { opacity: 1; }
.legend {
  display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 12.5px; color: var(--soft);
  padding-left: 56px;
}
.legend b { color: var(--ink); font-weight: 600; }
.legend i {
  display: inline-block; width: 14px; height: 3px; border-radius: 2px; background: currentColor;
  margin-right: 6px; vertical-align: 3px;
}
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); }
.c3 { color: var(--c3); }
.c4 { color: var(--c4); } .c5 { color: var(--c5); } .c6 { color: var(--c6); }
.c7 { color: var(--c7); }

caption { white-space: nowrap; text-align: start; font-weight: 600; padding: 10px 0 4px; }
th, td { white-space: nowrap; }

.heat { border-collapse: separate; border-spacing: 2px; }
.heat th {
  padding: 0 8px 0 0; font-weight: 400; font-size: 12.5px; max-width: 260px; overflow: hidden;
  text-overflow: ellipsis;
}
.heat thead th { padding: 0; text-align: center; vertical-align: bottom; }
.heat img { width: 28px; height: 28px; object-fit: cover; border-radius: 4px; display: block; }
.heat td {
  width: 28px; min-width: 28px; height: 22px; padding: 0; border-radius: 3px;
  background: color-mix(in srgb, var(--accent) calc(var(--v) * 100%), var(--page));
}
.heat .own { outline: 2px solid var(--c1); outline-offset: -1px; }

.queries {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(520px, 100%), 1fr));
  gap: 14px 26px;
}
.query p { margin: 0 0 6px; }
.found { display: flex; flex-wrap: wrap; gap: 8px; }
.found figure { width: 96px; text-align: center; font-size: 12px; color: var(--soft); }
.found img, .side img {
  width: 96px; height: 96px; object-fit: contain; border-radius: 8px; background: var(--page);
  border: 2px solid transparent;
}
.found .right img { border-color: var(--c2); }
.found .right figcaption { color: var(--c2); font-weight: 600; }
.mistakes figure { width: 132px; }
.side { display: flex; gap: 12px; align-items: flex-start; }
.side ol { margin: 0; padding-inline-start: 20px; flex: 1; font-size: 13.5px; }
.side .right { font-weight: 600; color: var(--c2); }
"""
)
