"""Functions that build the Serve applications from JSON arguments, as a Serve config names them by import path."""

from collections.abc import Mapping
from typing import Any

from ray import serve

from qsun.serve.ray.ingress import Ingress
from qsun.serve.ray.plan import ENGINE, INGRESS
from qsun.serve.ray.replica import EngineReplica


def engines(args: Mapping[str, Any]) -> Any:
    """Return the application of one pool of replicas."""
    return serve.deployment(EngineReplica, name=ENGINE, **args["deployment"]).bind(args["engine"])


def ingress(args: Mapping[str, Any]) -> Any:
    """Return the application that clients talk to."""
    deployment = serve.deployment(serve.ingress()(Ingress), name=INGRESS, **args["deployment"])
    return deployment.bind(args["cluster"], args["pools"])
