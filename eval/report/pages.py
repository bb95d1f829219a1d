"""An evaluation as pages: report.md, and report.html with its pictures in one file."""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from math import exp

from qsun.eval.output.table import Table
from qsun.eval.report.summary import Report, shown_p
from qsun.eval.speed.report import speed_table

_CAPTIONS = {
    "accuracy": "Accuracy by task and variant; whiskers are 95% intervals.",
    "bits": "Mean accuracy by bits of the shared decode module.",
    "speed": "Time per output token, and speed-up over SUN; dashed: by bytes at copy bandwidth.",
}
_DIVERGENCE_COLUMNS = {
    "variant": "{name}",
    "positions": "{positions:,.0f}",
    "perplexity": "{perplexity:.4g}",
    "loss": "{loss:.4f}",
    "KL x 1000": "{kl:.3f}",
    "largest p99": "{p99:.2f}",
    "same top token": "{top1:.2%}",
}
_STYLE = """
:root{color-scheme:light dark;--fg:#1f2933;--dim:#616e7c;--line:#d9dee4;--bg:#fff;--card:#f6f8fa;--mark:#2f81f7}
@media(prefers-color-scheme:dark){:root{--fg:#e4e7eb;--dim:#9aa5b1;--line:#323f4b;--bg:#12171d;--card:#1b222b}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--fg);font:15px/1.55 system-ui,sans-serif}
main{max-width:1000px;margin:0 auto;padding:32px 20px 64px}h1{font-size:26px;margin:0 0 4px}
h2{font-size:18px;margin:36px 0 10px}p.sub{color:var(--dim);margin:0 0 20px}
ul.say{list-style:none;padding:0;margin:0}ul.say li{background:var(--card);border-left:3px solid var(--mark);
padding:8px 12px;margin:6px 0}.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:14px;min-width:60%}
th,td{padding:5px 12px;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th{color:var(--dim);font-weight:600}th:first-child,td:first-child{text-align:left}td small{color:var(--dim)}
figure{margin:16px 0}img{max-width:100%;background:#fff;border-radius:6px;border:1px solid var(--line)}
figcaption{color:var(--dim);font-size:13px}code,pre{font:13px/1.5 ui-monospace,monospace}
pre{background:var(--card);padding:12px;overflow-x:auto;white-space:pre-wrap;word-break:break-word}
"""


def tables(report: Report) -> dict[str, Table]:
    """Return tables by heading, those that the report has numbers for."""
    found: dict[str, Table] = {}
    if report["accuracy"]:
        found["Accuracy, % (± standard error)"] = _accuracy(report)
        differences = _differences(report)
        if differences.rows:
            found[f"Against {report['reference']}, mean of tasks, example by example"] = differences
    for key, heading in (("responses", "At decode positions"), ("text", "On running text")):
        if report[key]:
            found[f"{heading}: divergence from the full-precision decoder"] = _divergence(report[key])
    if report.get("speed"):
        found[f"Speed of a decode step: {report['speed']['model']}"] = speed_table(report["speed"])
    return found


def _accuracy(report: Report) -> Table:
    tasks = list(report["accuracy"])
    rows = [
        [name, str(report["bits"][name]), *(_rate(report["accuracy"][task].get(name)) for task in tasks)]
        for name in report["variants"]
    ]
    return Table(["variant", "decode bits", *tasks], rows)


def _rate(cell: Mapping[str, float] | None) -> str:
    return f"{100 * cell['rate']:.1f} ± {100 * cell['stderr']:.1f}" if cell else ""


def _differences(report: Report) -> Table:
    """Return the comparison with the reference over the last column of the accuracy table."""
    columns = ["variant", "points", "95% interval", "McNemar p", f"right only here / only {report['reference']}"]
    rows = [
        [
            name,
            f"{100 * cell['difference']:+.1f}",
            f"{100 * cell['low']:+.1f} to {100 * cell['high']:+.1f}",
            shown_p(cell["p_value"]).removeprefix("= "),
            f"{cell['only_b']:.0f} / {cell['only_a']:.0f}",
        ]
        for name, cell in list(report["accuracy"].values())[-1].items()
        if "difference" in cell
    ]
    return Table(columns, rows)


def _divergence(found: Mapping[str, Mapping[str, float]]) -> Table:
    rows = [
        {
            **values,
            "name": name,
            "perplexity": exp(min(values["loss"], 100)),
            "kl": 1000 * values["mean_kl"],
            "p99": 1000 * values["p99_kl"],
        }
        for name, values in found.items()
    ]
    return Table.of(rows, _DIVERGENCE_COLUMNS)


def report_text(report: Report) -> str:
    """Return lines for a terminal."""
    parts = [f"{heading}\n{table.text()}\n" for heading, table in tables(report).items()]
    return "\n".join([*parts, *report["sentences"]])


def markdown(report: Report, pictures: Sequence[str]) -> str:
    """Return report.md; pictures are the names of PNG files beside it."""
    parts = ["# qsun evaluation", *(f"- {line}" for line in report["sentences"])]
    parts += [f"\n## {heading}\n\n{table.markdown()}" for heading, table in tables(report).items()]
    parts += [f"\n![{_CAPTIONS[name]}]({name}.png)" for name in pictures]
    parts += ["", "## How this was made", "", "```", *_provenance(report), "```"]
    return "\n".join(parts) + "\n"


def page(report: Report, pictures: Mapping[str, bytes]) -> str:
    """Return report.html, which needs no other file and no network."""
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in report["sentences"])
    body = [f'<ul class="say">{lines}</ul>' if lines else ""]
    for heading, table in tables(report).items():
        body.append(f"<h2>{html.escape(heading)}</h2>{table.html()}")
        names = {"Accuracy": ("accuracy", "bits"), "Speed": ("speed",)}.get(heading.partition(",")[0].split()[0], ())
        body += [_figure(name, pictures[name]) for name in names if name in pictures]
    made = html.escape("\n".join(_provenance(report)))
    body.append(f"<h2>How this was made</h2><pre>{made}</pre>")
    sub = f"{report['provenance']['finished'][:10]} · {report['provenance']['machine']}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><title>qsun evaluation</title>'
        f'<style>{_STYLE}</style></head><body><main><h1>qsun evaluation</h1><p class="sub">{html.escape(sub)}</p>'
        f"{''.join(body)}</main></body></html>\n"
    )


def _figure(name: str, png: bytes) -> str:
    data, caption = base64.b64encode(png).decode(), html.escape(_CAPTIONS[name])
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )


def _provenance(report: Report) -> list[str]:
    made = report["provenance"]
    return [
        f"$ {made['command']}",
        "versions: " + ", ".join(f"{name} {version}" for name, version in made["versions"].items()),
        f"machine:  {made['machine']}, {made['cores']} cores, {made['system']}",
        f"seed:     {made['seed']}",
        f"finished: {made['finished']}",
        f"settings: {json.dumps(report['settings'])}",
    ]
