"""Ray Serve's own LLM application before an engine that computes nothing: python tests/serve/ray/live/plain_llm.py

The figures of costs.py, for comparison: here there is no exchange, and no process beside the actor. It needs
`ray.serve.llm` and vLLM for its imports; their versions need not be those that Ray pins.
"""

import asyncio
import json
import os
import sys

from tests.places import ROOT

NAME = "plain"


class FakeEngine:
    """Stands where Ray's VLLMEngine would be: the text of tests/serve/fake_vllm.py, an event for each token."""

    def __init__(self, llm_config):
        self._name = llm_config.model_id

    async def start(self):
        pass

    async def check_health(self):
        pass

    def routing_stats(self):
        return {}

    async def completions(self, request, raw_request_info=None):
        from ray.serve.llm.openai_api_models import CompletionResponse

        from tests.serve.fake_vllm import word
        from tests.serve.relay_cost import EVENT_SECONDS

        head = {"id": "x", "object": "text_completion", "created": 1, "model": self._name}
        words = [word(NAME, request.prompt, place) for place in range(request.max_tokens)]
        if request.stream:
            for place, text in enumerate(words):
                await asyncio.sleep(EVENT_SECONDS)
                reason = "length" if place == len(words) - 1 else None
                choices = [{"index": 0, "text": text, "finish_reason": reason, "logprobs": None}]
                yield f"data: {json.dumps(head | {'choices': choices})}\n\n"
            yield "data: [DONE]\n\n"
            return
        choices = [{"index": 0, "text": "".join(words), "finish_reason": "length", "logprobs": None}]
        counts = {"prompt_tokens": 1, "completion_tokens": len(words), "total_tokens": 1 + len(words)}
        yield CompletionResponse(**head, choices=choices, usage=counts)


def main():
    from tests.serve.ray.live.costs import measured
    from tests.serve.ray.live.nodes import temporary_root
    from tests.serve.relay_cost import answers

    with temporary_root() as root:
        os.environ |= {"PYTHONPATH": str(ROOT), "TEST_ROOT": str(root), "RAY_USAGE_STATS_ENABLED": "0"}
        os.environ |= {
            "OMP_NUM_THREADS": "1",
            "RAYLLM_VLLM_ENGINE_CLS": f"tests.serve.ray.live.plain_llm.{FakeEngine.__name__}",
        }
        import ray
        from ray import serve
        from ray.serve.llm import LLMConfig, build_openai_app

        from qsun.demo import base_directory
        from qsun.serve.ray.engine.command import free_ports

        ray.init(address="local", num_cpus=8, log_to_driver=False)
        try:
            port = free_ports(1)[0]
            serve.start(http_options={"port": port})
            config = LLMConfig(
                model_loading_config={"model_id": NAME, "model_source": str(base_directory())},
                deployment_config={"num_replicas": 1, "max_ongoing_requests": 256},
                placement_group_config={"bundles": [{"CPU": 1}]},
            )
            serve.run(build_openai_app({"llm_configs": [config]}), blocking=False)
            url = f"http://127.0.0.1:{port}"
            asyncio.run(answers(url, NAME))
            roles = {"ingress": "ray::ServeReplica:default:OpenAi", "proxy": "ray::ProxyActor"}
            roles["engine's replica"] = "ray::ServeReplica:default:LLMServer"
            print(json.dumps(measured(root, url, NAME, NAME, roles)), flush=True)
        finally:
            serve.shutdown()
            ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())
