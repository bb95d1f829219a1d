"""Stands where vLLM would be: `qsun up` starts its API server."""
