"""FOLDER/report.md of bench.py: what was measured beside what the bytes alone take, from whatever results there are."""

import json
import sys
from collections import Counter
from pathlib import Path

GOALS = {1: 2.5, 8: 2.2, 32: 1.7, 64: 1.45}  # times as fast as SUN, by batch


def read(folder, name):
    """Return the results of a stage; a line that a kill cut off is left out."""
    file = Path(folder) / f"{name}.jsonl"
    found = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def table(heads, rows):
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def outcomes(folder):
    """Return the outcome of each test so far: passed, failed or skipped."""
    found = {}
    for row in read(folder, "tests"):
        if "test" in row and found.get(row["test"]) != "failed":
            found[row["test"]] = row["outcome"]
    return found


def tests_line(folder):
    counts = Counter(outcomes(folder).values())
    selected = sum(row.get("selected", 0) for row in read(folder, "tests"))
    listed = ", ".join(f"{counts[name]} {name}" for name in ("passed", "failed", "skipped"))
    return f"- tests: {listed}, {max(0, selected - sum(counts.values()))} of {selected} not run"


def failed_lines(folder):
    reasons = {row["test"]: row.get("why", "") for row in read(folder, "tests") if row.get("outcome") == "failed"}
    return [f"- {test}: {why[:300]}" for test, why in reasons.items()]


def stage_lines(folder):
    if read(folder, "tests"):
        yield tests_line(folder)
    for stage in read(folder, "stages"):
        if "left_out" in stage:
            yield f"- {stage['stage']}: left out, {stage['left_out']}"
        else:
            ended = {None: "ended, its time was over", 0: "done"}.get(stage["status"], f"FAILED ({stage['status']})")
            yield f"- {stage['stage']}: {ended}, {stage['seconds']:.0f} s"


def step_table(rows):
    def line(row):
        floor, goal = row["floor_ms"], GOALS.get(row["batch"], "")
        times = (f"{floor:.2f}", f"{row['tpot_ms']:.2f}", f"{row['bandwidth_percent']:.0f}%")
        place = (row["batch"], row["context"], row["variant"])
        return (*place, *times, f"{row['ratio_to_sun']:.2f}", "" if row["variant"] == "sun" else goal)

    heads = ("batch", "context", "decode module", "floor ms", "measured ms", "% of copy", "x SUN", "goal")
    return table(heads, map(line, rows))


def kernel_table(rows):
    def line(row):
        floor = row["microseconds"] * row["bandwidth_percent"] / 100
        times = (f"{floor:.1f}", f"{row['microseconds']:.1f}", f"{row['bandwidth_percent']:.0f}%")
        kernel = row["kernel"] if row["kernel"] == "bf16" else f"{row['kernel']}, {row.get('bits', 4)} bits"
        place = (row["model"], f"{row['layer']} {row['N']}x{row['K']}", row["M"], kernel)
        return (*place, *times, f"{row['ratio_to_bf16']:.2f}")

    heads = ("model", "layer", "M", "kernel", "floor us", "measured us", "% of copy", "x bf16")
    return table(heads, map(line, rows))


def slower_lines(rows):
    """Where ours is slower than bf16."""
    for row in rows:
        if row["kernel"] == "ours" and row["ratio_to_bf16"] < 1:
            place = f"{row['model']} {row['layer']} M={row['M']}, {row.get('bits', 4)} bits"
            yield f"- {place}: {row['ratio_to_bf16']:.2f} of bf16's speed"


def serve_lines(folder):
    for result in read(folder, "serve"):
        if "graphs" in result:
            yield f"- {result['graphs']} graphs captured in {result['warm_seconds']:.1f} s before the first request"
        else:
            shape = f"{result['requests']} requests of {result['prompt_tokens']} + {result['new_tokens']} tokens"
            speed = f"{result['tokens_per_s']:.0f} tokens/s, TTFT p50 {result['ttft_p50_s']:.2f} s"
            yield f"- {shape}: {speed}{'' if result['done'] else ', cut short'}"


def report(folder):
    machine = (read(folder, "machine") or [{"machine": "an unknown machine"}])[-1]
    named = ", ".join(f"{key} {value}" for key, value in machine.items() if key != "machine")
    parts = [f"# GPU run on {machine['machine']}\n\n{named}", "\n".join(stage_lines(folder))]
    failed = failed_lines(folder)
    if failed:
        parts.append("## Failed tests\n\n" + "\n".join(failed))
    steps, kernels = read(folder, "step"), read(folder, "kernels")
    if steps:
        parts.append(f"## Decode step, {steps[0]['model']}: int4 and 2-bit over bf16\n\n{step_table(steps)}")
    serving = "\n".join(serve_lines(folder))
    if serving:
        parts.append(f"## Serving\n\n{serving}")
    if kernels:
        slower = "\n".join(slower_lines(kernels)) or "- nowhere"
        parts.append(f"## Products\n\nSlower than bf16:\n{slower}\n\n{kernel_table(kernels)}")
    tuned = [file.name for file in Path(folder).glob("*.json")]
    if tuned:
        parts.append(f"## Tuned launches\n\n{', '.join(sorted(tuned))}: copy to kernels/configs/")
    return "\n\n".join(parts) + "\n"


def write_report(folder):
    """Replace FOLDER/report.md at once, so that there is always a whole one."""
    unfinished = Path(folder) / "report.md.tmp"
    unfinished.write_text(report(folder))
    unfinished.replace(Path(folder) / "report.md")


if __name__ == "__main__":
    write_report(sys.argv[1])
