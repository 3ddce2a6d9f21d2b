"""How a report looks: plain CSS, light and dark, nothing loaded from outside."""

CSS = """
:root{--bg:#fcfcfb;--card:#fff;--ink:#1b1d21;--soft:#5c626b;--line:#dfe2e6;--accent:#0b62a4;--good:#167a4b;
--bad:#b3381f;--strong:#e8f1f9;--shade:#cfe3f3;--heat:#e08a3c}
@media screen and (prefers-color-scheme:dark){:root{
--bg:#15171a;--card:#1d2024;--ink:#e7e9ec;--soft:#a2a9b3;
--line:#343940;--accent:#6cb6f2;--good:#5cc796;--bad:#f0886f;--strong:#22344a;--shade:#2b4a66;
--heat:#b4631d}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif}
main{max-width:1120px;margin:0 auto;padding:1.5rem 1.25rem 3rem}
h1{font-size:1.35rem;margin:0}
h2{font-size:1.15rem;margin:2.5rem 0 .3rem}
h3{font-size:1rem;margin:1.4rem 0 .4rem}
p{margin:.4rem 0}
.sub,.note,footer,figcaption,caption,.detail{color:var(--soft);font-size:.875rem}
.note{max-width:75ch}
.headline{margin:1rem 0;padding:.2rem 0 .2rem 1rem;border-left:4px solid var(--accent)}
.answer{font-size:1.45rem;line-height:1.3;font-weight:600;margin:0 0 .4rem;max-width:56ch;text-wrap:balance}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:.75rem;margin:1rem 0}
.tile{display:flex;flex-direction:column;background:var(--card);border:1px solid var(--line);
border-radius:8px;
padding:.7rem .9rem;border-top:3px solid var(--line)}
.tile.good{border-top-color:var(--good)}.tile.bad{border-top-color:var(--bad)}
.tile .label{font-size:.875rem;color:var(--soft)}
.tile .value{font-size:1.6rem;font-weight:650;line-height:1.25;font-variant-numeric:tabular-nums}
.tile.good .value{color:var(--good)}.tile.bad .value{color:var(--bad)}
.badge{display:inline-block;border:1px solid currentColor;border-radius:99px;padding:0 .55em;
font-size:.8125rem;
color:var(--soft);white-space:nowrap}
.badge.good{color:var(--good)}.badge.bad{color:var(--bad)}
figure{margin:1rem 0}
figure img{display:block;width:100%;height:auto;border:1px solid var(--line);border-radius:8px}
figcaption{margin-top:.4rem;max-width:85ch}
.scroll{overflow-x:auto;margin:.8rem 0}
table{border-collapse:collapse;font-size:.875rem;width:100%;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:0 0 .4rem}
th,td{padding:.32rem .6rem;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
thead th{color:var(--soft);font-weight:600;border-bottom:2px solid var(--line);vertical-align:bottom}
tbody th{font-weight:500;white-space:nowrap}
.n{text-align:right;white-space:nowrap}
thead .n{white-space:normal}
tr.divider td{color:var(--soft);padding-top:.9rem}
tr.strong th,tr.strong td{background:var(--strong);font-weight:650}
td[style],th[style]{background:color-mix(in srgb,var(--heat) calc(var(--tint)*.75),transparent)}
.ci{color:var(--soft);font-size:.8125rem;font-weight:400}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem;margin:.6rem 0;font-size:.9375rem}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
details{margin:.8rem 0}
summary{cursor:pointer;color:var(--accent);padding:.25rem 0}
summary:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,480px),1fr));gap:.9rem}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.8rem 1rem}
.card h3{margin:0 0 .4rem}
.card dl{font-size:.875rem;margin:.4rem 0 0}
audio{width:100%;height:36px;margin:.3rem 0 0;display:block}
.wave{display:block;width:100%;height:44px}
.wave path{stroke:var(--soft);stroke-width:1.2;fill:none;vector-effect:non-scaling-stroke}
.wave rect{fill:var(--shade)}
del{color:var(--bad)}mark{background:none;color:var(--bad);font-weight:600}
code{font-size:.85em;overflow-wrap:anywhere}
footer{margin-top:3rem;border-top:1px solid var(--line);padding-top:.8rem}
"""
