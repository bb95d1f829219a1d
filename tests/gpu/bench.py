"""All that `make gpu` measures, in one call that ends in time: `python tests/gpu/bench.py FOLDER [options]`.

Each stage is a process of its own with a share of the time, and appends each result to FOLDER as soon as it has it,
so that whatever ends the run leaves what was measured; results of an earlier run are removed. FOLDER/report.md is
written anew after every stage: measurements beside floors (bytes over copy bandwidth). For a machine with torch,
triton, transformers and pytest; a stage that needs more says so and is left out.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

_KILL_SECONDS = 3  # between asking a stage to end and making it


@dataclass(frozen=True)
class Stage:
    """least: seconds without which it is left out; later stages' are kept for them. most: seconds that it gets."""

    name: str
    least: float
    most: float


STAGES = [
    Stage("tests", 30, 130),
    Stage("step", 40, 120),
    Stage("kernels", 40, 110),
    Stage("serve", 25, 60),
    Stage("tune", 30, 600),
]


def stage_seconds(number, stages, left):
    """Return the seconds for a stage, 0 to leave it out, of those that are left."""
    stage, kept = stages[number], 0
    for later in stages[number + 1 :]:
        if stage.least + kept + later.least <= left:
            kept += later.least
    return min(stage.most, left - kept) if left >= stage.least else 0


def append(folder, name, result):
    """Add a line to FOLDER/NAME.jsonl; it is on the disk when this returns."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with (Path(folder) / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(result) + "\n")
        file.flush()
        os.fsync(file.fileno())


def remove_results(folder):
    """Remove what an earlier run left: its report would mix both. Other files stay."""
    from qsun.kernels.launch_table import parse_launch_table

    for pattern in ("*.jsonl", "*.log", "report.md*", "tests.xml"):
        for old in folder.glob(pattern):
            old.unlink()
    for table in folder.glob("*.json"):
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
            parse_launch_table(json.loads(table.read_text()))
            table.unlink()


def command(stage, folder, device, seconds):
    stages = Path(__file__).with_name("stages.py")
    return [sys.executable, str(stages), stage.name, str(folder), "--device", device, "--seconds", f"{seconds:.0f}"]


def run_stage(stage, folder, device, seconds):
    """Run a stage and return its exit status; None where it was ended because its time was over."""
    with (folder / f"{stage.name}.log").open("w") as log:
        process = subprocess.Popen(
            command(stage, folder, device, seconds), cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            end(process)
            with contextlib.suppress(ProcessLookupError):  # what it started and did not end
                os.killpg(process.pid, signal.SIGKILL)


def end(process):
    """Ask a stage and what it started to end, then make them."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            try:
                process.wait(_KILL_SECONDS)
            except subprocess.TimeoutExpired:
                continue


def run(folder, device, seconds, stages, started):
    """Run the stages; return whether none failed, and no test, in a stage whose time was over either."""
    from tests.gpu.floors import outcomes, write_report

    fine = True
    for number, stage in enumerate(stages):
        share = stage_seconds(number, stages, seconds - (time.monotonic() - started))
        if not share:
            append(folder, "stages", {"stage": stage.name, "left_out": f"needs {stage.least:g} seconds"})
            continue
        print(f"{stage.name}: up to {share:.0f} s, {folder / stage.name}.log", flush=True)
        begun = time.monotonic()
        status = run_stage(stage, folder, device, share)
        fine &= status in (0, None)
        append(folder, "stages", {"stage": stage.name, "seconds": time.monotonic() - begun, "status": status})
        write_report(folder)
    write_report(folder)
    print((folder / "report.md").read_text(), flush=True)
    return fine and "failed" not in outcomes(folder).values()


def main():
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=520, help="for everything; `make gpu` promises 9 minutes")
    parser.add_argument("--stages", default=",".join(stage.name for stage in STAGES))
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    remove_results(given.folder)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the stage that runs is ended, too
    stages = [stage for stage in STAGES if stage.name in given.stages.split(",")]
    sys.exit(not run(given.folder.resolve(), given.device, given.seconds, stages, started))


if __name__ == "__main__":
    main()
