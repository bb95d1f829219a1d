"""vllm_moved.py OUT MODEL: whether prefill-only LoRA is refused by a vLLM whose internals moved, for each of them.

OUT holds a 1 for each case that ended with the error that it must: each function with another parameter; each absent;
and an engine of MODEL whose start meets the first of these.
"""

import sys

import numpy as np
from vllm import LLM

from qsun.errors import QsunError
from qsun.vllm import prefill_lora


def refused(start, name):
    try:
        start()
    except QsunError as error:
        text = str(error)
        return name in text and "use vLLM 0.32" in text and "\n" not in text
    return False


def moved(self, quite, another):
    """Stands where vLLM's function was."""


def main(out, model):
    found = []
    for module, owner, name, *_ in prefill_lora._REPLACEMENTS:
        target = prefill_lora._find(module, owner)
        original = getattr(target, name)
        setattr(target, name, moved)
        found.append(refused(prefill_lora.install, name))
        delattr(target, name)
        found.append(refused(prefill_lora.install, name))
        setattr(target, name, original)
        assert not hasattr(original, "qsun")
    module, owner, name, *_ = prefill_lora._REPLACEMENTS[0]
    setattr(prefill_lora._find(module, owner), name, moved)
    found.append(refused(lambda: LLM(model, skip_tokenizer_init=True, enforce_eager=True), name))
    np.save(out, np.array(found, dtype=np.int64), allow_pickle=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
