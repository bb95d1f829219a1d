"""Stands where vLLM would be: replicas start its API server."""
