"""Tuning runs in two processes: this file is run by each process of torchrun with a list of runs as JSON (`run`)."""

import json
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from safetensors.torch import save_file

import qsun
from qsun.model.output_dir import Workdir
from qsun.tuning import processes, run_state, tuner
from qsun.tuning.job import prepare_tuning
from qsun.tuning.processes import Processes
from qsun.tuning.tuner import Tuner
from tests.places import ROOT
from tests.warm_process import as_two_ranks

CONFIG = qsun.TuneConfig(steps=6, batch_size=4, lr=3e-3, eval_every=2)


def first_gradients(base, out, data, config=CONFIG, teacher=None):
    """This process's share of the gradients of the first step, summed over all processes."""
    job = prepare_tuning(base, out, data, config, teacher=teacher, device="cpu")
    ours = Processes.launched(job.device)
    with Workdir(Path(f"{out}-{ours.rank}"), job.settings(), resume=False) as work:
        first = Tuner(job, work, ours)
        first.gradients(first.batches.of_step(0))
    return {name: master.grad.clone() for name, master in first.optimizer.masters.items()}


def held_bytes(base, out, data, config=CONFIG):
    """Bytes of weights held between two steps, each storage counted once."""
    job = prepare_tuning(base, out, data, config, device="cpu")
    ours = Processes.launched(job.device)
    with Workdir(Path(f"{out}-{ours.rank}"), job.settings(), resume=False) as work:
        first = Tuner(job, work, ours)
        first.train_step()
    modules = vars(first.models).values()
    found = [t for m in modules if isinstance(m, torch.nn.Module) for t in (*m.parameters(), *m.buffers())]
    local = [t.to_local() if hasattr(t, "to_local") else t for t in (tensor.detach() for tensor in found)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}.values())


def stop_after(step, pause_s=0):
    """Progress that interrupts after this step, and takes its time over the first answer of a teacher."""

    def progress(label, done, _):
        if label == "the teacher answers" and done == 1:
            time.sleep(pause_s)
        elif done == step:
            raise KeyboardInterrupt

    return progress


def run(
    base,
    out,
    data,
    gradients=None,
    stop=-1,
    teacher=None,
    timeout_s=None,
    pause_s=0,
    save_s=0.0,
    poll_s=0.2,
    **settings,
):
    """Tune, Ctrl-C after the step `stop`; before it save this process's gradients and the bytes of weights it holds.

    timeout_s: of the process group's own waits. save_s: between two states. poll_s: between looks at the first process.
    """
    run_state._SAVE_SECONDS, processes._POLL_SECONDS = save_s, poll_s
    tuner.plot_losses = lambda *_: None
    config = qsun.TuneConfig.from_dict(CONFIG.to_dict() | settings)
    if timeout_s is not None:
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
    if gradients is not None:
        save_measurements(base, data, gradients, config)
    resume = Path(f"{out}.partial").exists()
    qsun.tune(base, out, data, config, teacher=teacher, device="cpu", progress=stop_after(stop, pause_s), resume=resume)


def save_measurements(base, data, gradients, config):
    rank = Processes.launched(torch.device("cpu")).rank
    share = first_gradients(base, gradients, data, config)
    save_file(share, f"{gradients}.{rank}")
    held = held_bytes(base, f"{gradients}-weights", data, config)
    Path(f"{gradients}.{rank}.json").write_text(json.dumps(held))


def run_all(runs):
    torch.set_num_threads(1)
    for settings in json.loads(runs):
        run(**settings)


def by_torchrun(*runs):
    """Tuning runs one after another, started as `accelerate launch` does with several GPUs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [__file__, json.dumps(runs, default=str)]
    here = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False, env=here)


def in_two_processes(*runs):
    """The same in warm processes. Returns (whether both succeeded, stderr)."""
    return as_two_ranks(run_all, json.dumps(runs, default=str))


if __name__ == "__main__":
    run_all(sys.argv[1])
