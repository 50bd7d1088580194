"""How the page looks: light and dark, on a desktop and on a phone."""

__all__ = ["STYLE"]

STYLE = """
:root { --back: #ffffff; --card: #f5f6f8; --ink: #1c2430; --soft: #5d6877; --line: #dde1e7;
  --was: #c3cad4; --now: #2f6fd0; --error: #b4532a; --third: #4d8a54; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14181e; --card: #1d232b; --ink: #e4e8ee; --soft: #9aa5b4; --line: #313a46;
    --was: #4a5564; --now: #6ea3f0; --error: #e08d62; --third: #7fc088; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 1160px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 1.6rem; margin: 0 0 16px; }
h2 { font-size: 1.2rem; margin: 40px 0 4px; }
h3 { font-size: 1rem; margin: 0 0 6px; overflow-wrap: anywhere; }
p { margin: 4px 0 12px; color: var(--soft); max-width: 76ch; overflow-wrap: anywhere; }
code, .name { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: 0.86em; overflow-wrap: anywhere; }
ul { margin: 0; padding-left: 20px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 12px; margin: 0 0 12px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; min-width: 0; }
.card dt { color: var(--soft); font-size: 0.86rem; }
.card dd { margin: 0; font-size: 1.5rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.card dd + dd { font-size: 0.9rem; font-weight: 400; color: var(--soft); overflow-wrap: anywhere; }
.key { display: inline-block; width: 12px; height: 12px; border-radius: 2px; margin: 0 5px -1px 14px; }
.key:first-child { margin-left: 0; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; }
.key.was, .bar .was { background: var(--was); }
.key.now, .bar .now { background: var(--now); }
.bar .error { background: var(--error); }
table { width: 100%; border-collapse: collapse; margin: 8px 0; }
th { text-align: left; font-weight: 600; font-size: 0.86rem; color: var(--soft); padding: 4px 12px 4px 0; border-bottom: 1px solid var(--line); }
td { padding: 6px 12px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
td.what { width: 30%; }
td .soft, .soft { color: var(--soft); font-size: 0.86em; }
.kept td { color: var(--soft); }
.bar { position: relative; height: 9px; background: var(--card); border-radius: 2px; margin-bottom: 2px; min-width: 90px; }
.bar i { position: absolute; left: 0; top: 0; bottom: 0; min-width: 1px; border-radius: 2px; }
.small { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 250px), 1fr)); gap: 12px; }
.small .card { padding: 10px 12px; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
.axis { stroke: var(--line); fill: none; }
.line { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
.mark { stroke-width: 1.2; stroke-dasharray: 3 2; }
.mode0 { stroke: var(--now); } .mode1 { stroke: var(--error); } .mode2 { stroke: var(--third); }
.key.mode0 { background: var(--now); } .key.mode1 { background: var(--error); } .key.mode2 { background: var(--third); }
.graphs { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 12px; }
.graph { overflow: auto; max-height: 760px; }
.graph svg { max-width: none; margin: 0 auto; }
.node { fill: var(--back); stroke: var(--was); }
.node.cut { stroke: var(--now); stroke-width: 1.6; }
.node.join { fill: none; stroke: none; }
svg text.strong { fill: var(--ink); font-weight: 600; }
.edge { fill: none; stroke: var(--soft); stroke-width: 1; opacity: 0.7; }
.here { fill: var(--error); }
.dot { fill: var(--now); }
.plot { max-width: 620px; }
.groups { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); gap: 12px; }
@media (max-width: 720px) {
  main { padding: 16px 14px 40px; }
  .cards { grid-template-columns: 1fr 1fr; }
  .card dd { font-size: 1.15rem; }
  .layers thead { display: none; }
  .layers tr { display: grid; grid-template-columns: 1fr 1fr; gap: 4px 14px; padding: 8px 0; border-bottom: 1px solid var(--line); }
  .layers td { border: 0; padding: 0; min-width: 0; }
  .layers td.what { grid-column: 1 / -1; width: auto; }
  .layers td.none { display: none; }
  .layers td[data-label]::before { content: attr(data-label); display: block; color: var(--soft); font-size: 0.8rem; }
}
@media print { body { font-size: 11px; } tr { break-inside: avoid; } .graph { overflow: visible; max-height: none; } }
"""
