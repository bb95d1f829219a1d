"""Whether the Python of vLLM servers has what they need, asked before they take minutes to start."""

import json
import subprocess
from collections.abc import Mapping

from qsun.errors import QsunError

_SECONDS = 120.0
_PROBE = (
    "import json, importlib.metadata as m, importlib.util as u; "
    "names = [p.name for p in m.entry_points(group='vllm.general_plugins')]; "
    "print(json.dumps({'vllm': u.find_spec('vllm') is not None, 'nixl': u.find_spec('nixl') is not None, "
    "'qsun': 'qsun' in names}))"
)


def check_environment(python: str, kernels: str, environment: Mapping[str, str], transfers: bool) -> None:
    """Raise QsunError if the servers' Python lacks vLLM, NIXL for transfers or, for our kernels, our plugin."""
    probe = [python, "-c", _PROBE]
    try:
        done = subprocess.run(  # noqa: S603 - an argument list, no shell
            probe, env=dict(environment), capture_output=True, text=True, timeout=_SECONDS, check=False
        )
        found = json.loads(done.stdout)
    except OSError as error:
        raise QsunError(f"launch.python {python} cannot be run: {error.strerror}") from None
    except (subprocess.TimeoutExpired, ValueError):
        raise QsunError(f"launch.python {python} does not work as a Python interpreter") from None
    fixes = {"vllm": "install vLLM there"} | ({"nixl": "pip install nixl there"} if transfers else {})
    if kernels == "qsun":
        fixes["qsun"] = "pip install qsun there, or set launch.kernels: vllm"
    for name, fix in fixes.items():
        if not found[name]:
            what = "qsun plugin for vLLM" if name == "qsun" else name
            raise QsunError(f"launch.python {python} has no {what}; {fix}, or name another environment")
