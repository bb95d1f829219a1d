"""An evaluation as pages: report.md, and report.html, one file with its pictures in it."""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from qsun.eval.report.summary import shown_p

Report = Mapping[str, Any]
Table = tuple[list[str], list[list[str]]]

_CAPTIONS = {
    "accuracy": "Accuracy by task and variant; whiskers are 95% intervals.",
    "bits": "Mean accuracy against the bits of the shared decode module.",
    "speed": "Time per output token, and how many times as fast as SUN; dashed: by bytes over the copy bandwidth.",
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
    """Heading -> (columns, rows), those that the report has numbers for."""
    found: dict[str, Table] = {}
    if report["accuracy"]:
        tasks = list(report["accuracy"])
        rows = [
            [name, str(report["bits"][name]), *(_rate(report["accuracy"][task].get(name)) for task in tasks)]
            for name in report["variants"]
        ]
        found["Accuracy, % (± standard error)"] = (["variant", "decode bits", *tasks], rows)
        rows = [
            [
                name,
                _points(cell["difference"]),
                f"{_points(cell['low'])} to {_points(cell['high'])}",
                shown_p(cell["p_value"]).removeprefix("= "),
                f"{cell['only_b']:.0f} / {cell['only_a']:.0f}",
            ]
            for name, cell in report["accuracy"][tasks[-1]].items()
            if "difference" in cell
        ]
        reference = report["reference"]
        if rows:
            columns = ["variant", "points", "95% interval", "McNemar p", f"right only here / only {reference}"]
            found[f"Against {reference}, mean of tasks, example by example"] = (columns, rows)
    for key, heading in (("responses", "At decode positions"), ("text", "On running text")):
        if report[key]:
            columns = ["variant", "positions", "perplexity", "loss", "KL x 1000", "largest p99", "same top token"]
            found[f"{heading}: divergence from the full-precision decoder"] = (columns, _divergence(report[key]))
    if report.get("speed"):
        found[f"Speed of a decode step: {report['speed']['model']}"] = _speed(report["speed"]["rows"])
    return found


def _rate(cell: Mapping[str, float] | None) -> str:
    return f"{100 * cell['rate']:.1f} ± {100 * cell['stderr']:.1f}" if cell else ""


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


def _divergence(found: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    from math import exp

    return [
        [
            name,
            f"{d['positions']:,.0f}",
            f"{exp(min(d['loss'], 100)):.4g}",
            f"{d['loss']:.4f}",
            f"{1000 * d['mean_kl']:.3f}",
            f"{1000 * d['p99_kl']:.2f}",
            f"{100 * d['top1']:.2f}%",
        ]
        for name, d in found.items()
    ]


def _speed(rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = ["variant", "lm_head", "batch", "context", "TTFT ms", "TPOT ms", "p95 ms", "tokens/s", "x SUN"]
    columns += ["weights GB", "KV GB", "% of copy"]
    return columns, [
        [
            *(str(row[key]) for key in ("variant", "lm_head", "batch", "context")),
            f"{row['ttft_ms']:.1f}",
            f"{row['tpot_ms']:.2f}",
            f"{row['tpot_p95_ms']:.2f}",
            f"{row['tokens_per_s']:.1f}",
            f"{row['ratio_to_sun']:.2f}",
            f"{row['weight_bytes'] / 1e9:.3f}",
            f"{row['kv_bytes'] / 1e9:.3f}",
            f"{row['bandwidth_percent']:.0f}%",
        ]
        for row in rows
    ]


def markdown(report: Report, pictures: Sequence[str]) -> str:
    """report.md; pictures are the names of PNG files beside it."""
    parts = ["# qsun evaluation", *(f"- {line}" for line in report["sentences"])]
    for heading, (columns, rows) in tables(report).items():
        lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
        parts += ["", f"## {heading}", "", *(f"| {' | '.join(line)} |" for line in lines)]
    parts += [f"\n![{_CAPTIONS[name]}]({name}.png)" for name in pictures]
    parts += ["", "## How this was made", "", "```", *_provenance(report), "```"]
    return "\n".join(parts) + "\n"


def page(report: Report, pictures: Mapping[str, bytes]) -> str:
    """report.html: needs no other file and no network."""
    say = "".join(f"<li>{html.escape(line)}</li>" for line in report["sentences"])
    body = [f'<ul class="say">{say}</ul>' if say else ""]
    shown = [_figure(name, png) for name, png in pictures.items() if name != "speed"]
    for heading, table in tables(report).items():
        body.append(f"<h2>{html.escape(heading)}</h2>{_html_table(table)}")
        if heading.startswith("Accuracy"):
            body += shown
        if heading.startswith("Speed") and "speed" in pictures:
            body.append(_figure("speed", pictures["speed"]))
    made = html.escape("\n".join(_provenance(report)))
    body.append(f"<h2>How this was made</h2><pre>{made}</pre>")
    machine = report["provenance"]["machine"]
    sub = f"{report['provenance']['finished'][:10]} · {machine['gpu'] or machine['processor']}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><title>qsun evaluation</title>'
        f'<style>{_STYLE}</style></head><body><main><h1>qsun evaluation</h1><p class="sub">{html.escape(sub)}</p>'
        f"{''.join(body)}</main></body></html>\n"
    )


def _html_table(table: Table) -> str:
    columns, rows = table
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    lines = "".join(f"<tr>{''.join(f'<td>{_cell(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def _cell(text: str) -> str:
    """The error of a rate in small print."""
    rate, sign, error = html.escape(text).partition(" ± ")
    return f"{rate} <small>± {error}</small>" if sign else rate


def _figure(name: str, png: bytes) -> str:
    data, caption = base64.b64encode(png).decode(), html.escape(_CAPTIONS[name])
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )


def _provenance(report: Report) -> list[str]:
    made = report["provenance"]
    machine = {key: value for key, value in made["machine"].items() if value is not None}
    return [
        f"$ {made['command']}",
        "versions: " + ", ".join(f"{name} {version}" for name, version in made["versions"].items()),
        "machine:  " + ", ".join(f"{key} {value}" for key, value in machine.items()),
        f"seed:     {made['seed']}",
        f"finished: {made['finished']}",
        f"settings: {json.dumps(report['settings'])}",
    ]
