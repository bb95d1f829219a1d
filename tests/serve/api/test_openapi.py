"""schemathesis against the server's own description: no request causes a 500, and all answers match the description."""

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance

from qsun.serve.api.metrics import Metrics
from tests.serve.api.test_api import served


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_body_makes_a_500(make_engine):
    metrics = Metrics()
    with served(make_engine(metrics), metrics, admin=True) as client:
        schema = schemathesis.openapi.from_url(f"{client.base_url}/openapi.json")
        asked = 0
        for found in schema.get_all_operations():
            asked += _ask(found.ok(), client)
        assert asked > 200
        assert client.get("/health").status_code == 200
        assert not client.serving.thread.failure


def _ask(operation, client):
    asked = 0

    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def ask(case):
        nonlocal asked
        asked += 1
        response = case.call(base_url=str(client.base_url))
        case.validate_response(response, checks=[not_a_server_error, content_type_conformance, status_code_conformance])

    hypothesis.given(case=operation.as_strategy())(ask)()
    if operation.method == "post":
        wrong = operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)
        hypothesis.given(case=wrong)(ask)()
    return asked
