"""The style of every page: light and dark by the reader's setting, colours that hold up in colour blindness."""

from __future__ import annotations

STYLE = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--text:#1c2430;--soft:#566070;--line:#dde2e9;--grid:#e9ecf1;
--c0:#0b63b5;--c1:#b8560b;--c2:#0b7a57;--c3:#8a3fa0;--c4:#a98a00;--c5:#4a5a6a;--base:#7a8594;--good:#0b7a57;
--bad:#b3261e;
--good-bg:#e3f4ec;--bad-bg:#fbe9e7}
@media (prefers-color-scheme:dark){:root{--bg:#12161c;--card:#1a2029;--text:#e6eaf0;--soft:#9aa6b5;--line:#2d3642;
--grid:#252d38;--c0:#6cb2f5;--c1:#f0a35c;--c2:#58c9a0;--c3:#cf9ce6;--c4:#e2cc5a;--c5:#b4c0cd;--base:#8a95a4;
--good:#58c9a0;
--bad:#ff8f85;--good-bg:#173a2e;--bad-bg:#46211f}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--text);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;
font-variant-numeric:tabular-nums}
main{max-width:1160px;margin:0 auto;padding:36px 20px 60px}
header{margin-bottom:26px}
h1{font-size:27px;line-height:1.2;margin:0 0 4px;letter-spacing:-.01em;text-wrap:balance}
h2{font-size:19px;margin:38px 0 4px;letter-spacing:-.005em}
h3{font-size:15px;margin:22px 0 8px}
header p,.lead{color:var(--soft);margin:0 0 14px;max-width:78ch}
header p{overflow-wrap:anywhere}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:14px;margin:14px 0}
.card,.chart,.panel{background:var(--card);border:1px solid var(--line);border-radius:10px}
.card{padding:14px 16px}
.card .name{color:var(--soft);font-size:13px}
.card .number{font-size:26px;font-weight:600;line-height:1.25;letter-spacing:-.01em}
.card .detail{color:var(--soft);font-size:13px}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr));gap:14px;margin:14px 0}
.chart{margin:0;padding:14px 16px 10px;min-width:0}
.chart>svg{display:block;width:100%;height:auto}
figcaption{font-weight:600;font-size:14px;margin-bottom:4px}
.note,.empty{color:var(--soft);font-size:13px;margin:4px 0}
.empty{padding:12px 0}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:13px;color:var(--soft);margin-bottom:4px}
.key{display:inline-flex;align-items:center;gap:6px}
.swatch{width:24px;height:10px}
svg text{fill:var(--soft);font-size:11.5px}
svg .corner{fill:var(--text);font-weight:600;font-size:12px;paint-order:stroke;stroke:var(--card);stroke-width:4px}
svg .name{fill:var(--text);font-size:12.5px}
.grid{stroke:var(--grid)}.axis,.mark{stroke:var(--base)}.split{stroke:var(--base);stroke-dasharray:4 4}
.line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.raw{stroke-width:1;opacity:.35}
.line.c0,.dots.c0{stroke:var(--c0)}.line.c1,.dots.c1{stroke:var(--c1)}.line.c2,.dots.c2{stroke:var(--c2)}
.line.c3,.dots.c3{stroke:var(--c3)}.line.c4,.dots.c4{stroke:var(--c4)}.line.c5,.dots.c5{stroke:var(--c5)}
.line.c1:not(.raw){stroke-dasharray:9 4}.line.c2:not(.raw){stroke-dasharray:3 4}
.line.c3:not(.raw){stroke-dasharray:10 4 2 4}
.line.base{stroke:var(--base);stroke-width:7;opacity:.4}
.dot.c0{fill:var(--c0)}.dot.c1{fill:var(--c1)}.dot.c2{fill:var(--c2)}.dot.c3{fill:var(--c3)}.dot.c4{fill:var(--c4)}
.dot.c5{fill:var(--c5)}
.dots{fill:none;stroke-width:4;stroke-linecap:round;opacity:.5}
.bar{fill:var(--c0);opacity:.88}
.mini{display:block;width:100%;height:18px;margin-top:6px}
.track{stroke:var(--grid);stroke-width:5;stroke-linecap:round}.interval{stroke:var(--c0);stroke-width:5;opacity:.45;
stroke-linecap:round}
.value{fill:var(--c0)}.chance{stroke:var(--bad);stroke-width:2}
.scroll{overflow-x:auto}
.panel{padding:6px 16px;margin:14px 0}
.charts>.panel,.videos>.panel{margin:0}
table{border-collapse:collapse;width:100%;font-size:14px}
th{text-align:left;color:var(--soft);font-weight:600;font-size:13px}
th,td{padding:6px 14px 6px 0;border-bottom:1px solid var(--line);vertical-align:top}
tr:last-child td{border-bottom:0}
td.n,th.n{text-align:right;white-space:nowrap}
td:not(.n){overflow-wrap:anywhere}
.rule{white-space:nowrap}
details{margin:14px 0}summary{cursor:pointer;font-weight:600}
.columns{columns:2 380px;column-gap:32px}
.columns div{break-inside:avoid;display:flex;justify-content:space-between;gap:16px;padding:3px 0;
border-bottom:1px solid var(--line);font-size:13.5px}
.columns span:first-child{color:var(--soft)}.columns span:last-child{text-align:right;overflow-wrap:anywhere;
min-width:0}
.videos{display:grid;grid-template-columns:repeat(auto-fill,minmax(200px,1fr));gap:14px;margin:14px 0}
.videos.pairs{grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr))}
.videos.small{grid-template-columns:repeat(auto-fill,minmax(150px,1fr))}
.sample{padding:10px}
.sample .prompt{overflow-wrap:anywhere}
.sample .prompt{font-size:14px;margin:8px 0 6px}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:8px}
.pair .note{margin:0 0 2px}
video,img{display:block;width:100%;border-radius:6px;background:#000}
.chip{display:inline-block;font-size:12.5px;border-radius:99px;padding:1px 9px;margin:0 6px 4px 0;
border:1px solid var(--line)}
.chip.good{color:var(--good);background:var(--good-bg);border-color:transparent}
.chip.bad{color:var(--bad);background:var(--bad-bg);border-color:transparent}
@media print{body{background:#fff}.card,.chart,.panel{break-inside:avoid}}
"""
