"""The style sheet of the statistics page: light and dark, no fonts or files from elsewhere."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1b2330; --soft: #667085; --rule: #e4e7ec; --bar: #2f6fde;
}
@media (prefers-color-scheme: dark) {
  :root { --page: #11151b; --card: #1a2029; --ink: #e6e9ee; --soft: #97a1b0; --rule: #2c3542; --bar: #6ea2ff; }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "Noto Sans", sans-serif;
}
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 24px; margin: 0 0 14px; overflow-wrap: anywhere; }
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
.chart .name { fill: var(--ink); }
.chart .grid { stroke: var(--rule); }
.chart .axis, .chart .tick { stroke: var(--soft); }
.chart rect { fill: var(--bar); }
.chart rect:hover { opacity: 0.7; }
.scroll { overflow-x: auto; margin: 0 0 18px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 18px 4px 0; text-align: start; }
thead th { color: var(--soft); font-weight: 500; font-size: 13px; white-space: nowrap; }
tbody tr { border-top: 1px solid var(--rule); }
.number { text-align: end; white-space: nowrap; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(200px, 100%), 1fr)); gap: 20px; }
.samples img {
  width: 100%; height: 192px; object-fit: contain; border-radius: 8px; background: var(--page);
}
.samples p { margin: 4px 0 0; font-size: 13.5px; line-height: 1.4; overflow-wrap: anywhere; }
.samples small { overflow-wrap: anywhere; }
.language {
  background: var(--page); border: 1px solid var(--rule); border-radius: 6px; padding: 0 6px;
  font-size: 11.5px; color: var(--soft);
}
"""
