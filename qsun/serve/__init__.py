"""Serving: the in-process engine and its HTTP API, the router in front of vLLM workers, and their replicas on Ray."""
