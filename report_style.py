"""The look of a report: one style sheet, for a screen of any width, light or dark, and for paper.

The model is the supplement of a paper. Text is set in a serif at a readable measure, figures and tables in a sans serif
with digits of one width; a table has three rules and no boxes; colour is kept for what must be seen, a simulated link
or a failure. Everything is in the page: fonts are those that the reader has.

The colours of text have a contrast of 4.5 to 1 or more to what is behind them in either scheme (WCAG AA); a test works
it out. Plots keep a white card in the dark, as they are drawn in dark ink.
"""

from __future__ import annotations

LIGHT = {
    "paper": "#fdfcf9",
    "ink": "#1c1e21",
    "soft": "#565b63",
    "hair": "#dcd8cf",
    "rule": "#1c1e21",
    "link": "#1d4f91",
    "shade": "#f3f0e9",
    "warn": "#fff1d2",
    "warn-ink": "#553600",
    "warn-edge": "#c27c0e",
    "bad": "#fce6e1",
    "bad-ink": "#78190d",
    "bad-edge": "#b3311d",
}
DARK = {
    "paper": "#14161a",
    "ink": "#e7e5df",
    "soft": "#a8adb5",
    "hair": "#363b43",
    "rule": "#b9b6ae",
    "link": "#9dc3ff",
    "shade": "#1f2329",
    "warn": "#352809",
    "warn-ink": "#ffdc96",
    "warn-edge": "#d9992b",
    "bad": "#3b1a15",
    "bad-ink": "#ffc4b8",
    "bad-edge": "#e0644e",
}
# Text -> what it may stand on.
PAIRS = (("ink", "paper"), ("soft", "paper"), ("link", "paper"), ("ink", "shade"), ("soft", "shade"))
PAIRS += (("warn-ink", "warn"), ("bad-ink", "bad"), ("link", "shade"))


def _variables(colours: dict[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


STYLE = (
    f"""
:root {{ color-scheme: light dark; {_variables(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}
@media print {{ :root {{ color-scheme: light; {_variables({**LIGHT, "paper": "#ffffff"})} }} }}
"""
    + """
* { box-sizing: border-box; }
html { font-size: 17px; -webkit-text-size-adjust: 100%; text-size-adjust: 100%; scroll-padding-top: 1rem; }
body {
  margin: 0; background: var(--paper); color: var(--ink); line-height: 1.55;
  font-family: Charter, "Bitstream Charter", "Iowan Old Style", "Source Serif 4", Cambria, Georgia, "Liberation Serif",
    serif;
}
.page { max-width: 82rem; margin: 0 auto; padding: 3rem 2rem 5rem; }
table, nav, figcaption, .note, .tag, .facts, .eyebrow, .machine, .settings, pre, code, .notice h2 {
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif;
  font-variant-numeric: tabular-nums lining-nums;
}
pre, code { font-family: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "Liberation Mono", monospace; }
code { font-size: .86em; overflow-wrap: anywhere; }
a { color: var(--link); text-decoration-thickness: 1px; text-underline-offset: .15em; }
a:focus-visible, [tabindex]:focus-visible { outline: 3px solid var(--link); outline-offset: 3px; }
p, dl, ol, ul { margin: 0 0 1rem; }
main p, main > section > ul { max-width: 44rem; }

header { border-bottom: 2px solid var(--rule); padding-bottom: 1.6rem; margin-bottom: 1.8rem; }
.eyebrow { font-size: .74rem; letter-spacing: .09em; text-transform: uppercase; color: var(--soft); margin: 0 0 .5rem; }
h1 { font-size: 2.3rem; line-height: 1.14; font-weight: 600; letter-spacing: -.012em; margin: 0 0 .7rem; }
.lead { font-size: 1.12rem; max-width: 48rem; color: var(--soft); margin-bottom: 1.4rem; }
h2 { font-size: 1.5rem; line-height: 1.22; font-weight: 600; margin: 3.4rem 0 .9rem; padding-top: .9rem;
  border-top: 1px solid var(--hair); }
h3 { font-size: 1.08rem; line-height: 1.3; font-weight: 600; margin: 2rem 0 .6rem; }
h1, h2, h3, dd, th { overflow-wrap: break-word; }

.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .9rem 1.8rem; margin: 0;
  font-size: .86rem; line-height: 1.4; }
.facts dt { color: var(--soft); font-size: .78rem; }
.facts dd { margin: 0; overflow-wrap: anywhere; }

nav { font-size: .84rem; line-height: 1.35; }
nav p { font-weight: 600; margin: 0 0 .5rem; }
nav ol { list-style: none; margin: 0; padding: 0; columns: 2; column-gap: 1.5rem; }
nav li { margin: 0; break-inside: avoid; }
nav a { display: block; padding: .34rem 0; color: var(--ink); text-decoration: none; }
nav a:hover { color: var(--link); text-decoration: underline; }

.notice { border-left: 5px solid; padding: .9rem 1.2rem; margin: 0 0 1.2rem; max-width: 60rem; }
.notice h2 { font-size: 1rem; font-weight: 700; margin: 0 0 .25rem; padding: 0; border: 0; }
.notice p { margin: 0; max-width: none; }
.notice p + p { margin-top: .5rem; }
.warn { background: var(--warn); color: var(--warn-ink); border-color: var(--warn-edge); }
.bad { background: var(--bad); color: var(--bad-ink); border-color: var(--bad-edge); }
.notice a { color: inherit; }

.scroll { overflow-x: auto; margin: 1.8rem 0 .5rem; max-width: 100%; background:
  linear-gradient(to left, var(--paper) 40%, transparent) right / 2rem 100% no-repeat local,
  linear-gradient(to left, var(--hair), transparent) right / .8rem 100% no-repeat scroll; }
table { border-collapse: separate; border-spacing: 0; font-size: .82rem; line-height: 1.35; width: 100%; }
tbody tr:last-child > * { border-bottom: 2px solid var(--rule); }
caption { text-align: left; padding: 0 0 .55rem; }
caption span { display: block; position: sticky; left: 0; max-width: min(52rem, calc(100vw - 2.4rem)); }
caption b, figcaption b { font-weight: 650; }
thead th { border-top: 2px solid var(--rule); border-bottom: 1px solid var(--rule); vertical-align: bottom;
  font-weight: 600; text-align: right; line-height: 1.25; }
th, td { padding: .36rem .75rem; text-align: right; vertical-align: top; }
td { white-space: nowrap; }
.wide th, .wide td { padding-left: .45rem; padding-right: .45rem; }
th:first-child, td:first-child { padding-left: .15rem; }
th:last-child, td:last-child { padding-right: .15rem; }
tbody th { font-weight: 400; text-align: left; white-space: nowrap; }
tbody th.long { white-space: normal; min-width: 13rem; max-width: 24rem; }
th.text, td.text { text-align: left; }
td small { color: var(--soft); }
td.long { white-space: normal; min-width: 16rem; max-width: 34rem; overflow-wrap: anywhere; }
tbody tr.section > * { border-top: 1px solid var(--hair); }
tbody tr:hover > * { background: var(--shade); }
td.none { color: var(--soft); }
.tag { display: inline-block; font-size: .66rem; line-height: 1; padding: .12rem .28rem .14rem; margin-left: .15rem;
  border: 1px solid var(--hair); border-radius: 2px; white-space: nowrap; vertical-align: .1em; color: var(--soft); }
.tag.sim { color: var(--warn-ink); background: var(--warn); border-color: var(--warn); }
.note { font-size: .78rem; line-height: 1.45; color: var(--soft); max-width: 56rem !important; margin: 0 0 .4rem; }

figure { margin: 2.2rem 0; break-inside: avoid; }
.card { background: #fff; border: 1px solid var(--hair); border-radius: 4px; padding: .8rem; overflow-x: auto; }
.card img { display: block; width: 100%; min-width: calc(.68 * var(--drawn)); height: auto; }
figcaption { font-size: .82rem; line-height: 1.45; margin-top: .6rem; max-width: 56rem; }

.machine { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; font-size: .86rem; line-height: 1.45;
  margin: 0 0 1.4rem; max-width: 60rem; border-top: 1px solid var(--hair); }
.machine > div { display: contents; }
.settings { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); column-gap: 2.2rem;
  font-size: .84rem; line-height: 1.4; margin: 0 0 1.2rem; }
.settings > div { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 1rem; align-items: baseline;
  padding: .26rem 0; border-bottom: 1px solid var(--hair); }
.settings dt { color: var(--soft); }
.settings dd { margin: 0; text-align: right; overflow-wrap: anywhere; }
.machine dt, .machine dd { padding: .32rem 1.2rem .32rem 0; border-bottom: 1px solid var(--hair); margin: 0; }
.machine dt { color: var(--soft); }
.machine dd { overflow-wrap: anywhere; padding-right: 0; }
pre { background: var(--shade); padding: .9rem 1.1rem; overflow-x: auto; font-size: .78rem; line-height: 1.5;
  border-left: 3px solid var(--hair); margin: 0 0 1.2rem; max-width: 60rem; }
pre code { font-size: 1em; overflow-wrap: normal; }
.terms { font-size: .9rem; columns: 2; column-gap: 2.6rem; }
.terms > div { break-inside: avoid; margin-bottom: .75rem; }
.terms dt { font-weight: 600; }
.terms dd { margin: 0; }
footer { margin-top: 4rem; padding-top: 1rem; border-top: 1px solid var(--hair); font-size: .82rem;
  color: var(--soft); }

@media (min-width: 70rem) {
  .body { display: grid; grid-template-columns: 11.5rem minmax(0, 1fr); column-gap: 2.4rem; align-items: start; }
  nav { position: sticky; top: 1.5rem; max-height: calc(100vh - 3rem); overflow-y: auto; }
  nav ol { columns: 1; }
  main > section:first-of-type h2 { margin-top: 0; padding-top: 0; border-top: 0; }
}
@media (max-width: 44rem) {
  html { font-size: 16px; }
  .page { padding: 1.6rem 1.1rem 3rem; }
  h1 { font-size: 1.75rem; }
  h2 { font-size: 1.3rem; margin-top: 2.6rem; }
  .lead { font-size: 1.02rem; }
  .facts { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .8rem 1.1rem; }
  .terms { columns: 1; }
  .machine { grid-template-columns: minmax(6.5rem, 9rem) minmax(0, 1fr); }
  .scroll, .card { margin-right: -1.1rem; }
  .card { border-right: 0; border-radius: 4px 0 0 4px; }
  .card img { min-width: calc(.7 * var(--drawn)); }
  tbody th, tbody th.long { position: sticky; left: 0; z-index: 1; background: var(--paper); white-space: normal;
    min-width: 6.5rem; max-width: 8.5rem; }
  tbody tr:hover > th { background: var(--shade); }
  .tag { margin-left: 0; }
}
@media print {
  @page { margin: 15mm; }
  html { font-size: 10.5pt; }
  .page { max-width: none; padding: 0; }
  nav { display: none; }
  h2, h3, caption { break-after: avoid; }
  tr, .notice, pre { break-inside: avoid; }
  .scroll, .card, pre { overflow: visible; }
  pre { white-space: pre-wrap; }
  table { font-size: 7.6pt; }
  th, td { padding: .22rem .42rem; }
  .card { border: 0; padding: 0; }
  .card img { width: auto; min-width: 0; max-width: 100%; max-height: 21cm; }
  a { color: inherit; text-decoration: none; }
  tbody th { position: static; }
  .notice, .tag.sim { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
)
