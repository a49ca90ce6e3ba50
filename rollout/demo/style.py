"""The report's style sheet: light and dark by what the reader's system prefers."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #16202c; --soft: #5a6675; --faint: #98a3b0; --rule: #dfe4ea;
  --blue: #1f6feb; --orange: #d9730d; --green: #1a7f4b; --red: #c93c37; --violet: #7a4fd0; --grey: #7d8794;
  --green-wash: #e3f4ea; --red-wash: #fbe7e6;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f141a; --card: #171e27; --ink: #e7ecf2; --soft: #a3aebb; --faint: #6b7785; --rule: #2a333e;
    --blue: #5b9dff; --orange: #f2994a; --green: #4cc38a; --red: #ff7b72; --violet: #b18cff; --grey: #8b96a3;
    --green-wash: #15342a; --red-wash: #3d2123;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1400px; margin: 0 auto; padding: 48px 28px 80px; }
header .name { color: var(--soft); font-size: 14px; letter-spacing: .04em; margin: 0 0 10px; }
h1 {
  font-size: clamp(26px, 3.6vw, 42px); line-height: 1.15; letter-spacing: -.02em; margin: 0 0 16px;
  max-width: 26em; text-wrap: balance;
}
h1 b { color: var(--blue); font-weight: inherit; white-space: nowrap; }
h2 { font-size: 24px; letter-spacing: -.01em; margin: 64px 0 6px; }
h2 + p, .lead { color: var(--soft); max-width: 46em; margin: 0 0 22px; }
h3 { font-size: 16px; margin: 0 0 4px; }
h4 { font-size: 14px; margin: 0 0 6px; font-weight: 600; }
.tiles {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 14px;
  margin: 28px 0 0;
}
.tile, .card, .keeps, figure {
  background: var(--card); border: 1px solid var(--rule); border-radius: 12px; margin: 0; padding: 18px 20px;
}
.tile .value {
  font-size: 30px; font-weight: 650; letter-spacing: -.02em; font-variant-numeric: tabular-nums;
}
.tile .what { color: var(--soft); font-size: 14px; line-height: 1.4; }
.tile.first .value { color: var(--blue); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 16px; }
figcaption .note { color: var(--soft); font-size: 14px; margin: 0 0 8px; line-height: 1.45; }
.legend {
  display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; color: var(--soft); margin: 0 0 8px;
}
.legend i {
  display: inline-block; width: 18px; height: 3px; border-radius: 2px; margin-right: 7px;
  vertical-align: middle;
}
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 12.5px; font-family: inherit; }
svg .axis { fill: var(--faint); }
svg .row { fill: var(--ink); font-size: 14px; }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .line { fill: none; stroke-width: 2.4; stroke-linejoin: round; stroke-linecap: round; }
svg .dashed { fill: none; stroke-width: 2; stroke-dasharray: 6 5; }
svg .raw { fill: none; stroke-width: 1; opacity: .22; }
svg .bar { stroke-width: 3.5; opacity: .55; }
svg .dot { stroke: var(--card); stroke-width: 1.5; }
svg .hollow { fill: var(--card); stroke: var(--grey); stroke-width: 2; }
.scene { image-rendering: pixelated; border-radius: 4px; display: block; background: #000; }
.outcomes {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 16px;
}
.outcome { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; padding: 16px 18px; }
.outcome h3 { font-weight: 500; margin-bottom: 12px; }
.outcome .count { font-size: 22px; font-weight: 650; margin-right: 6px; font-variant-numeric: tabular-nums; }
.gained .count { color: var(--green); } .lost .count { color: var(--red); }
.thumbs { display: flex; flex-wrap: wrap; gap: 5px; }
.thumbs .scene { width: 42px; height: 42px; }
.gained .scene { outline: 2px solid var(--green); outline-offset: -1px; }
.lost .scene { outline: 2px solid var(--red); outline-offset: -1px; }
.method {
  display: grid; grid-template-columns: 190px 1fr; gap: 6px 24px; padding: 16px 0;
}
.keeps { padding: 4px 20px; }
.method + .method { border-top: 1px solid var(--rule); }
.method .right, .site p { color: var(--soft); font-size: 14px; line-height: 1.45; margin: 0; }
.method b { color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums; }
.site { display: grid; grid-template-columns: 240px 1fr; gap: 6px 24px; align-items: center; }
.site + .site { margin-top: 12px; }
.site .thumbs { display: grid; grid-template-columns: repeat(8, minmax(0, 88px)); gap: 10px; }
.site .scene { width: 100%; height: auto; background: var(--card); outline: 1px solid var(--rule); }
.card { display: grid; grid-template-columns: 170px 1fr; gap: 24px; margin-bottom: 16px; }
.card .scene { width: 168px; height: 168px; border-radius: 8px; }
.subject p { margin: 8px 0 0; line-height: 1.4; }
.subject .question { font-weight: 650; }
.subject .gold, .subject .facts { color: var(--soft); font-size: 14px; }
.subject b { color: var(--ink); font-weight: 600; }
.groups {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); gap: 26px;
  min-width: 0;
}
.groups > div { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 12.5px; line-height: 1.35; }
caption { text-align: left; color: var(--soft); font-size: 13px; padding: 0 0 6px; }
th { color: var(--faint); font-weight: 500; text-align: right; padding: 2px 0 4px 8px; font-size: 11.5px; }
th:nth-child(2) { text-align: left; }
td { border-top: 1px solid var(--rule); padding: 5px 0 5px 8px; vertical-align: top; }
td.mark { padding: 4px 2px 4px 0; font-weight: 700; width: 16px; }
.yes { color: var(--green); } .no { color: var(--red); }
td.reply { line-height: 1.6;
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: 12px;
}
td.number {
  text-align: right; font-variant-numeric: tabular-nums; color: var(--soft); white-space: nowrap;
  width: 1%;
}
td.number.zero { color: var(--faint); } td.number.full { color: var(--green); }
td.number.total { color: var(--ink); font-weight: 600; }
.reply .true {
  background: var(--green-wash); color: var(--green); border-radius: 4px; padding: 0 3px;
  white-space: nowrap;
}
.reply .false {
  background: var(--red-wash); color: var(--red); border-radius: 4px; padding: 0 3px;
  white-space: nowrap;
}
.reply .tag { color: var(--faint); font-size: 10.5px; }
footer {
  color: var(--soft); font-size: 14px; margin-top: 56px; border-top: 1px solid var(--rule);
  padding-top: 20px;
}
footer p { max-width: 60em; margin: 0 0 8px; }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .92em; }
@media (max-width: 1000px) { .method { grid-template-columns: 1fr; } }
@media (max-width: 760px) {
  .card, .site { grid-template-columns: 1fr; }
  .site .thumbs { grid-template-columns: repeat(4, minmax(0, 88px)); }
  main { padding: 28px 16px 60px; }
}
@media print { .card, figure, .outcome, .method { break-inside: avoid; } }
"""
