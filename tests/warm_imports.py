"""What a warm process (tests/warm_process.py) has imported when it starts."""

import accelerate  # noqa: F401
import torch
import uvicorn  # noqa: F401
from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401

import qsun.cli.main
import qsun.eval.study.run
import qsun.quantization.run
import qsun.serve.api.app
import qsun.serve.router.app
import qsun.tuning.tuner  # noqa: F401

torch.set_num_threads(1)  # a process forked from several has to do without them
