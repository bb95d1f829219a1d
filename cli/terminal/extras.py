"""Optional packages: which extra installs them."""

_EXTRAS = {
    "eval": ("lm_eval",),
    "data": ("datasets",),
    "serve": ("fastapi", "starlette", "uvicorn", "httpx", "prometheus_client"),
    "ray": ("ray",),
    "simulate": ("simpy",),
    "gptq": ("optimum", "gptqmodel"),
    "compressed-tensors": ("compressed_tensors",),
}


def missing_package(error: ModuleNotFoundError) -> str | None:
    """Return the line that says how to install a missing optional package; None for a package of no extra."""
    package = (error.name or "").partition(".")[0]
    for extra, packages in _EXTRAS.items():
        if package in packages:
            return f"{package} is not installed; pip install 'qsun[{extra}]'"
    return None
