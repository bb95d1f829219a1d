"""A plugin of vLLM for two cores: NIXL's thread looks for news every millisecond, where it would never rest.

It changes when KV cache arrives and nothing else. Take it with PYTHONPATH; vLLM finds it by its entry point.
"""

POLL_MICROSECONDS = 1000


def install():
    """Have every agent poll at this interval, whatever its caller sets."""
    from nixl_cu12 import _bindings

    original = _bindings.nixlAgentConfig
    if getattr(original, "calm", False):  # vLLM may load its plugins more than once
        return

    class Config(original):
        calm = True

        @property
        def pthrDelay(self):
            return original.pthrDelay.__get__(self)

        @pthrDelay.setter
        def pthrDelay(self, _microseconds):
            original.pthrDelay.__set__(self, POLL_MICROSECONDS)

    _bindings.nixlAgentConfig = Config
