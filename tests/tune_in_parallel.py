"""What each process of `accelerate launch` runs in test_tuning.py: BASE OUT DATA GRADIENTS."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import qsun
from qsun.parallel import Processes
from qsun.tune_job import prepare_tuning
from qsun.tuning import Tuner
from qsun.workdir import Workdir

CONFIG = qsun.TuneConfig(steps=6, batch_size=4, lr=3e-3, eval_every=2)


def first_gradients(base, out, data):
    """Of the first step, summed over all processes: this one's share."""
    job = prepare_tuning(base, out, data, CONFIG, device="cpu")
    processes = Processes(job.device)
    tuner = Tuner(job, Workdir(Path(f"{out}-{processes.rank}"), job.settings(), resume=False), processes)
    tuner.gradients(tuner._batch(0))
    return {name: master.grad.clone() for name, master in tuner.weights.masters.items()}


def stop_after(step):
    def progress(_, done, __):
        if done == step:
            raise KeyboardInterrupt

    return progress


if __name__ == "__main__":
    torch.set_num_threads(1)
    base, out, data, gradients, stop = sys.argv[1:]
    save_file(first_gradients(base, gradients, data), f"{gradients}.{Processes(torch.device('cpu')).rank}")
    qsun.tune(base, out, data, CONFIG, device="cpu", progress=stop_after(int(stop)))
