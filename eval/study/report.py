"""Tables and pictures of a study, from its scores alone."""

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from qsun.eval.output.table import Table
from qsun.eval.report.paired import Paired, compare
from qsun.eval.study.study import aligned_method, rates_by_rank
from qsun.figure import new_figure


class Scores:
    """Answers by seed, task and variant."""

    def __init__(self, result: dict[str, Any]):
        self.right: dict[str, dict[str, dict[str, str]]] = result["right"]
        self.first = next(iter(self.right.values()))
        self.study: dict[str, Any] = result["study"]
        self.rates: dict[str, dict[str, float]] = result.get("rates", {})
        self.tasks = [task["name"] for task in self.study["tasks"] if not task["hard"]]
        self.hard = [task["name"] for task in self.study["tasks"] if task["hard"]]
        self.best = aligned_method(self.study["methods"])

    def aligned(self, bits: int) -> str:
        return f"int{bits} {self.best} aligned"

    def answers(self, variant: str, tasks: Sequence[str] = ()) -> list[bool]:
        """Return whether each answer is right, for all seeds that have the variant, in one order for all variants."""
        tasks = tasks or self.tasks
        rows = [by_task[task] for by_task in self.right.values() for task in tasks if task in by_task]
        return [digit == "1" for row in rows if variant in row for digit in row[variant]]

    def rate(self, variant: str, tasks: Sequence[str] = ()) -> float:
        return fmean(self.answers(variant, tasks))

    def spread(self, variant: str) -> float:
        """Return the standard deviation over seeds of the rate of all examples; 0 for one seed."""
        means = [
            fmean(digit == "1" for task in self.tasks for digit in by_task[task][variant])
            for by_task in self.right.values()
            if variant in by_task.get(self.tasks[0], {})
        ]
        return stdev(means) if len(means) > 1 else 0.0

    def has(self, variant: str) -> bool:
        return variant in self.first[self.tasks[0]]

    def against(self, variant: str, reference: str) -> Paired:
        return compare(self.answers(reference), self.answers(variant))


def markdown(scores: Scores) -> str:
    """Return all tables of the study."""
    parts = [_head(scores), _main(scores), _by_method(scores), _differences(scores), _hard(scores), _curve(scores)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(scores: Scores) -> str:
    study, first = scores.study, scores.first
    counts = ", ".join(f"{task} {len(first[task]['sun'])}" for task in scores.tasks)
    text = (
        f"Right answers, %, of base {study['base']}; test examples: {counts}; seeds: {study['seeds']}. "
        f"{study['steps']} steps of {study['batch_size']} examples; peak rates: {_rates(scores)}. "
        "The column all counts every example alike, and the spread is its standard deviation over seeds; intervals are "
        "95%, by the paired bootstrap over all examples; p is of McNemar's test. Both hold for these modules; the "
        "spread says how much other training runs differ."
    )
    if study["seeds"] > 1 and any(task["train"] for task in study["tasks"]):
        text += " All seeds answer the same test files, whose answers count once a seed: intervals are somewhat narrow."
    return text


def _rates(scores: Scores) -> str:
    study = scores.study
    given = {"SUN": study["lr"], "full fine-tune": study["full_lr"]}
    of_adapters = rates_by_rank(study.get("lora_ranks", ()), study.get("lora_lr", ()))
    given |= {f"adapters of rank {rank}": rate for rank, rate in of_adapters.items()}
    if not scores.rates:
        return ", ".join(f"{rate:g} ({of})" if rate else f"by width ({of})" for of, rate in given.items())
    ends = {min(study["rates"]), max(study["rates"])}
    best = [
        f"on {task} "
        + ", ".join(
            f"{rate:g}{'*' * (rate in ends)} ({_label(scores, _variant(kind))})" for kind, rate in found.items()
        )
        for task, found in scores.rates.items()
    ]
    tried = ", ".join(f"{rate:g}" for rate in study["rates"])
    marked = "; *: the lowest or the highest tried, so others may be better" if "*" in str(best) else ""
    return f"the best of {tried} on validation data: {'; '.join(best)}{marked}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return Table(header, rows).markdown()


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _variant(kind: str) -> str:
    """Return the variant of modules of a kind that has one rate."""
    return f"sun {kind}" if kind.startswith("lora") else kind.replace("-", " ")


def _label(scores: Scores, variant: str) -> str:
    steps = scores.study["align_steps"]
    labels = {"base": "base, not tuned", "full": "full fine-tune", "sun longer": f"SUN, {steps} steps more"}
    labels |= {f"full lora{rank}": f"ordinary LoRA of rank {rank}" for rank in scores.study.get("lora_ranks", ())}
    return labels.get(variant, variant.replace("sun", "SUN") if variant.startswith("sun") else f"QSUN {variant}")


def _main(scores: Scores) -> str:
    names = [name for name in scores.first[scores.tasks[0]] if not _detail(scores, name)]
    rows = [
        [
            _label(scores, v),
            *(_percent(scores.rate(v, [t])) for t in scores.tasks),
            _percent(scores.rate(v)),
            _percent(scores.spread(v)),
        ]
        for v in sorted(names, key=_kind)
    ]
    return _table(["", *scores.tasks, "all", "spread"], rows)


def _detail(scores: Scores, variant: str) -> bool:
    """Return whether a variant stands in a table of its own: another budget, or another pass than the best."""
    first, _, rest = variant.partition(" ")
    return "-" in first or (first.startswith("int") and rest.split()[0] != scores.best)


def _kind(variant: str) -> int:
    """Return where a variant stands among the rows: what is not quantized comes first."""
    return int(variant.startswith("int"))


def _by_method(scores: Scores) -> str:
    rows = []
    for bits in scores.study["bits"]:
        for method in scores.study["methods"]:
            cells = (f"int{bits} {method} {kind}" for kind in ("text", "decode", "aligned"))
            shown = (
                f"{_percent(scores.rate(c))} +- {_percent(scores.spread(c))}" if scores.has(c) else "" for c in cells
            )
            rows.append([f"int{bits}", f"`{method}`", *shown])
    return _table(["", "pass", "packaged text", "decode positions, each task's own KV", "and aligned"], rows)


def _differences(scores: Scores) -> str:
    lora = [name for name in scores.first[scores.tasks[0]] if " lora" in name]
    pairs = [("sun", "full"), ("sun longer", "sun")]
    pairs += [(name, reference) for name in lora if name.startswith("sun") for reference in ("sun", "full")]
    pairs += [(name.replace("sun", "full"), "full") for name in lora if name.startswith("sun") and "dist" not in name]
    for bits in scores.study["bits"]:
        best = f"int{bits} {scores.best}"
        pairs += [(f"{best} {kind}", "sun") for kind in ("text", "decode", "aligned", "distilled")]
        pairs += [(f"{best} decode", f"{best} text"), (scores.aligned(bits), "sun longer")]
        pairs += [(name, "sun") for name in lora if name.startswith(best)]
    rows = []
    for variant, reference in pairs:
        if scores.has(variant) and scores.has(reference):
            found = scores.against(variant, reference)
            interval = f"{_percent(found.low)} .. {_percent(found.high)}"
            rows.append([f"{variant} - {reference}", _percent(found.difference), interval, f"{found.p_value:.2g}"])
    return _table(["difference", "points", "95% interval", "p"], rows)


def _hard(scores: Scores) -> str:
    if not scores.hard:
        return ""
    rows = [[task, *(_percent(scores.rate(v, [task])) for v in ("base", "full", "sun"))] for task in scores.hard]
    return "Where the frozen decoder breaks, seed 0:\n\n" + _table(["task", "base", "full fine-tune", "SUN"], rows)


def _curve(scores: Scores) -> str:
    budgets = [*scores.study["curve"], scores.study["steps"]]
    if len(budgets) == 1:
        return ""
    rows = [
        [label, *(_percent(_at(scores, how, steps)) for steps in budgets)]
        for how, label in (("full", "full fine-tune"), ("sun", "SUN"))
    ]
    return "All examples by budget, seed 0; every budget is a run of its own:\n\n" + _table(
        ["steps", *map(str, budgets)], rows
    )


def _at(scores: Scores, how: str, steps: int) -> float:
    variant = how if steps == scores.study["steps"] else f"{how}-{steps}"
    first = scores.first
    return fmean(digit == "1" for task in scores.tasks for digit in first[task][variant])


def bits_figure(scores: Scores) -> Any:
    """Draw the accuracy on all examples by bits: packaged text, decode positions, aligned; a panel a method."""
    methods, bits = scores.study["methods"], sorted(scores.study["bits"])
    figure = new_figure(2.6 * len(methods) + 0.6, 3.4)
    panels = figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
    kinds = (
        ("text", "0.5", "packaged text"),
        ("decode", "tab:orange", "decode positions"),
        ("aligned", "tab:blue", "aligned"),
    )
    for axes, method in zip(panels, methods, strict=True):
        for variant, style in (("full", ":"), ("sun", "--")):
            axes.axhline(
                100 * scores.rate(variant),
                color="0.3",
                linestyle=style,
                linewidth=1,
                label=variant.replace("sun", "SUN"),
            )
        for kind, color, label in kinds:
            shown = [b for b in bits if scores.has(f"int{b} {method} {kind}")]
            cells = [f"int{b} {method} {kind}" for b in shown]
            if shown:
                axes.errorbar(
                    shown,
                    [100 * scores.rate(c) for c in cells],
                    [100 * scores.spread(c) for c in cells],
                    color=color,
                    marker="o",
                    capsize=3,
                    label=label,
                )
        axes.set_title(method)
        axes.set_xticks(bits)
        axes.set_xlabel("bits of a decode weight")
        axes.set_ylim(0, 103)
    panels[0].set_ylabel("right answers, %, all tasks' examples")
    panels[-1].legend(fontsize=8, loc="lower right")
    return figure


def curve_figure(scores: Scores) -> Any:
    """Draw the accuracy on all examples by the budget of SUN and of the full fine-tune."""
    budgets = [*scores.study["curve"], scores.study["steps"]]
    figure = new_figure(5, 3.4)
    axes = figure.subplots()
    for how, label, color in (("full", "full fine-tune", "0.35"), ("sun", "SUN", "tab:orange")):
        axes.plot(budgets, [100 * _at(scores, how, s) for s in budgets], marker="o", color=color, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(budgets, [str(b) for b in budgets])
    axes.set_xlabel(f"steps of {scores.study['batch_size']} examples")
    axes.set_ylabel("right answers, %, all tasks' examples")
    axes.set_ylim(0, 103)
    axes.legend()
    return figure
