"""Tuning runs in two processes: this file is run by each process of torchrun with a list of runs as JSON (`run`)."""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from threading import Thread

import torch
from safetensors.torch import save_file

import qsun
from qsun.model.output_dir import Workdir
from qsun.tuning.job import prepare_tuning
from qsun.tuning.processes import Processes
from qsun.tuning.tuner import Tuner
from tests.places import ROOT
from tests.warm_process import WarmProcess

CONFIG = qsun.TuneConfig(steps=6, batch_size=4, lr=3e-3, eval_every=2)


def first_gradients(base, out, data, config=CONFIG, teacher=None):
    """This process's share of the gradients of the first step, summed over all processes."""
    job = prepare_tuning(base, out, data, config, teacher=teacher, device="cpu")
    processes = Processes.launched(job.device)
    with Workdir(Path(f"{out}-{processes.rank}"), job.settings(), resume=False) as work:
        tuner = Tuner(job, work, processes)
        tuner.gradients(tuner.batches.of_step(0))
    return {name: master.grad.clone() for name, master in tuner.optimizer.masters.items()}


def held_bytes(base, out, data, config=CONFIG):
    """Bytes of weights held between two steps, each storage counted once."""
    job = prepare_tuning(base, out, data, config, device="cpu")
    processes = Processes.launched(job.device)
    with Workdir(Path(f"{out}-{processes.rank}"), job.settings(), resume=False) as work:
        tuner = Tuner(job, work, processes)
        tuner.train_step()
    modules = vars(tuner.models).values()
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


def run(base, out, data, gradients=None, stop=-1, teacher=None, timeout_s=None, pause_s=0, **settings):
    """Tune, Ctrl-C after the step `stop`; before it save this process's gradients and the bytes of weights it holds.

    timeout_s: of the process group's own waits.
    """
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
    """The same in warm processes that find what torchrun tells its own. Returns (whether both succeeded, stderr)."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    text = json.dumps(runs, default=str)
    with WarmProcess(_rank, 0, port, text) as first, WarmProcess(_rank, 1, port, text) as second:
        said, both = [], (first, second)
        readers = [Thread(target=lambda process=process: said.append(process.stderr.read())) for process in both]
        for reader in readers:
            reader.start()
        while None in (ended := [process.poll() for process in both]) and not any(ended):
            time.sleep(0.05)
        for process in both if any(ended) else ():  # one failed, and the other may wait for it
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()
        ended = [process.wait() for process in both]
        for reader in readers:
            reader.join()
    return ended == [0, 0], "\n".join(said)


def _rank(rank, port, runs):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    run_all(runs)


if __name__ == "__main__":
    run_all(sys.argv[1])
