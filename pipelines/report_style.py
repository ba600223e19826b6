"""The style sheet of the report: system fonts, light, readable on a phone and on paper."""

STYLE = """
:root { --ink: #1e293b; --soft: #64748b; --line: #e2e8f0; --accent: #0f766e; --tint: #f0fdfa; }
* { box-sizing: border-box; }
body { margin: 0; background: #f8fafc; color: var(--ink); line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1360px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 30px; margin: 0; letter-spacing: -0.02em; }
h2 { font-size: 18px; margin: 0 0 14px; letter-spacing: -0.01em; }
p { max-width: 76ch; color: var(--soft); margin: 12px 0 0; }
p.about { margin: 4px 0 18px; }
section { background: white; border: 1px solid var(--line); border-radius: 12px; padding: 22px;
  margin-top: 18px; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; }
.tile { background: white; border: 1px solid var(--line); border-radius: 12px; padding: 12px 18px; }
.tile b { display: block; font-size: 24px; color: var(--accent); letter-spacing: -0.02em; }
.tile span { color: var(--soft); font-size: 13px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
table { font-size: 13.5px; }
th, td { padding: 7px 8px; text-align: right; white-space: nowrap; }
th { font-size: 12px; font-weight: 600; color: var(--soft);
  border-bottom: 2px solid var(--line); }
td { border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; font-weight: 600; }
tr.shown td { background: var(--tint); }
tr.shown td:first-child { color: var(--accent); }
tr.group td { color: var(--soft); font-size: 12px; padding-top: 14px; text-transform: uppercase;
  letter-spacing: 0.05em; }
tbody tr:last-child td { border-bottom: 0; }
table.about th, table.about td { text-align: left; white-space: normal; vertical-align: top;
  font-weight: 400; border-bottom: 1px solid var(--line); font-size: 14px; }
table.about { margin-top: 14px; }
ul.notes { color: #b45309; margin: 14px 0 0; padding-left: 20px; font-size: 14px; }
ul.found { margin: 12px 0 0; padding-left: 20px; font-size: 14px; }
details { margin-top: 14px; font-size: 14px; color: var(--soft); }
summary { cursor: pointer; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 16px; }
dt { font-weight: 600; } dd { margin: 0; }
.plot img { max-width: 100%; height: auto; display: block; margin: 0 auto; }
.moving { display: grid; grid-template-columns: repeat(auto-fit, minmax(120px, 1fr)); gap: 14px; }
figure { margin: 0; max-width: 240px; }
figure img { width: 100%; border-radius: 8px; display: block; }
figcaption { font-size: 13px; font-weight: 600; text-align: center; margin-top: 4px; }
.strips { display: grid; grid-template-columns: max-content 1fr 1fr; gap: 6px 12px;
  align-items: center; margin-top: 22px; font-size: 13px; }
.strips > span { color: var(--soft); }
.strips img { width: 100%; display: block; border-radius: 4px; }
.strips i { color: var(--soft); }
h3 { font-size: 13px; color: var(--soft); margin: 16px 0 6px; }
td i { color: var(--soft); font-style: normal; font-size: 12px; }
.answers { display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 14px;
  margin-top: 12px; }
figure.answer { max-width: none; min-width: 0; }
figure.answer figcaption { display: flex; justify-content: space-between; gap: 8px; }
figure.answer figcaption span { color: var(--soft); font-weight: 400; }
.answer b { color: #0f766e; } p del, .answer del { color: #b91c1c; }
p mark, .answer mark { background: #fee2e2; color: #b91c1c; }
pre { background: #0f172a; color: #e2e8f0; padding: 14px 18px; border-radius: 8px;
  white-space: pre-wrap; font-size: 13px; }
pre.quiet, figure.answer pre { background: #f1f5f9; color: #475569; margin: 4px 0 0;
  font-size: 12px; padding: 10px 12px; overflow-wrap: anywhere; }
figure.answer pre { max-height: 440px; overflow-y: auto; }
@media (max-width: 640px) {
  .strips { grid-template-columns: 1fr; } .strips > span { display: none; }
}
@media print { body { background: white; } figure.answer pre { max-height: none; }
  section { break-inside: avoid; } }
"""
