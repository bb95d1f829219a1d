"""What three nodes serve, two full modules and four adapters, by pretend or real vLLMs; and the right answers."""

import shutil
from pathlib import Path

import qsun
from tests.adapter_rig import merged, write_adapter
from tests.oracles.conftest import PROBE_SETTINGS
from tests.places import ROOT
from tests.serve.fake_vllm import expected_text
from tests.serve.ray import rig
from tests.serve.ray.live.load import Question
from tests.vllm import asking, cluster_files
from tests.vllm.running import CALM_PATH

ADAPTERS = ("poem", "tool", "chat", "sql")
ALL = (*rig.MODELS, *ADAPTERS)
UPDATED = "math2"  # the module that replaces that of "math"
START_SECONDS = 1800.0
PATIENT = {"interval_seconds": 1.0, "timeout_seconds": 60.0}  # other work may take most of the cores


class PretendFleet:
    """Pretend vLLMs, which follow vLLM's transfer protocol exactly. An answer depends on the module's name.

    Attributes:
        accepted: by model, the modules of which an answer may be.
        tokens: of an answer. scale_tokens: outstanding ones of a decode replica, with twice as many of which there
            are to be two.
    """

    tokens, scale_tokens = 30, 200
    token_seconds = 0.2

    def __init__(self, root: Path):
        self.root = root
        self.accepted = {model: (model,) for model in ALL}
        rig.make_modules(root)
        shutil.copytree(root / "code", root / UPDATED)
        self._adapters = rig.make_adapters(root / "adapters", ADAPTERS)

    def values(self) -> dict:
        """Return those of a cluster file, with the newest accepted module of "math"."""
        values = rig.cluster_values(self.root, self.token_seconds)
        values["prefill"] = {"module": "demo", "workers": 1}
        values["models"]["math"]["module"] = str(self.root / self.accepted["math"][-1])
        values["models"] |= self._adapters
        values["launch"]["start_seconds"] = START_SECONDS
        return values | {"health": PATIENT}

    def question(self, number: int) -> Question:
        """Return request `number`: models take turns, and so do streams and whole answers."""
        model, prompt = ALL[number % len(ALL)], f"{number} of some words"
        wanted = tuple(expected_text(module, prompt, self.tokens) for module in self.accepted[model])
        return Question(_body(model, prompt, self.tokens, number), wanted)


class RealFleet:
    """vLLM on this CPU in float32: an int4 decode module on our kernels, and prompts of 1 to 257 tokens.

    The right answers are those of `qsun.generate` with the same modules, adapters merged.

    Args:
        python: of the environment with vLLM, NIXL and our plugin.
    Attributes: as those of PretendFleet.
    """

    tokens, scale_tokens = 32, 800

    def __init__(self, root: Path, python: Path):
        self.root, self._python = root, python
        self.accepted = {model: (model,) for model in ALL}
        made = cluster_files.make_modules(root, (*rig.MODELS, UPDATED))
        for seed, name in enumerate(ADAPTERS):
            made[name] = write_adapter(root / "adapters" / name, made["base"], seed, rank=2 + 2 * seed)
        self._prompts = [asking.prompt(length, seed) for seed, length in enumerate(asking.LENGTHS)]
        self._answers = self._computed(made)

    def _computed(self, made: dict[str, Path]) -> dict[str, list[list[int]]]:
        """Return the answer to every prompt, by module."""
        decode = qsun.load_decode(made["decode"], device="cpu", dtype="float32")
        base = qsun.load_decode(made["base"], device="cpu", dtype="float32").model
        prefills = {
            name: merged(base, made[name]) if name in ADAPTERS else qsun.load_prefill(made[name], decode, "float32")
            for name in (*ALL, UPDATED)
        }
        answers = asking.answers_of(decode, prefills)
        requests = {name: [asking.Request(name, p, False, self.tokens) for p in self._prompts] for name in prefills}
        return {name: answers(own) for name, own in requests.items()}

    def values(self) -> dict:
        """Return those of a cluster file, with the newest accepted module of "math"."""
        values = cluster_files.cluster_values(self._python)
        values["decode"]["module"] = str(self.root / "decode")
        values["prefill"] = {"module": str(self.root / "base"), "workers": 1}
        for model in rig.MODELS:
            values["models"][model]["module"] = str(self.root / self.accepted[model][-1])
        values["models"] |= {name: {"adapter": str(self.root / "adapters" / name)} for name in ADAPTERS}
        values["launch"] |= {"max_num_seqs": 32, "start_seconds": START_SECONDS}
        values["launch"]["environment"] = {"PYTHONPATH": CALM_PATH}
        values["health"] = PATIENT
        values["ray"] = {"cpus": 0.5, "logs": str(self.root / "logs")}
        values["limits"]["no_worker_seconds"] = 300.0
        return values

    def question(self, number: int) -> Question:
        """Return request `number`: models take turns, prompts too, and so do streams and whole answers."""
        model, place = ALL[number % len(ALL)], number // len(ALL) % len(self._prompts)
        wanted = tuple(self._answers[module][place] for module in self.accepted[model])
        body = _body(model, list(self._prompts[place]), self.tokens, number)
        return Question(body | asking.EXACT | {"temperature": 0}, wanted)


def _body(model: str, prompt: str | list[int], tokens: int, number: int) -> dict:
    stream = (number // len(ALL) + number) % 2 == 0
    return {"model": model, "prompt": prompt, "max_tokens": tokens, "stream": stream}


def environment(root: Path) -> dict[str, str]:
    """Return variables for Ray and all that it starts. TEST_ROOT tells whose processes they are."""
    found = PROBE_SETTINGS | {"PYTHONPATH": str(ROOT), "TEST_ROOT": str(root), "RAY_USAGE_STATS_ENABLED": "0"}
    return found | {"RAY_worker_niceness": "0", "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "300"}
