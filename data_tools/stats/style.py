"""The style sheet of the statistics page: that of the reports, with bars and samples."""

from siglip_train.report.style import BASE

STYLE = (
    BASE
    + """
.chart .name { fill: var(--ink); }
.chart rect { fill: var(--accent); }
.chart rect:hover { opacity: 0.7; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(200px, 100%), 1fr)); gap: 20px; }
.samples img {
  width: 100%; height: 192px; object-fit: contain; border-radius: 8px; background: var(--page);
}
.samples p { margin: 4px 0 0; font-size: 13.5px; line-height: 1.4; overflow-wrap: anywhere; }
.samples small { overflow-wrap: anywhere; }
"""
)
