"""Add and remove prefill modules while the server runs. Off by default, because clients then name directories."""

import asyncio
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from qsun.adapters.adapter_module import AdapterLibrary
from qsun.engine.engine import Engine
from qsun.engine.requests import Refused
from qsun.engine.thread import EngineThread
from qsun.errors import QsunError
from qsun.model.locate import DEMO
from qsun.model.lora import ADAPTER_CONFIG
from qsun.runtime.prefill_module import PrefillModule, load_prefill
from qsun.serve.api.errors import DESCRIBED
from qsun.serve.http.errors import HttpError

MODEL_NAME = r"[A-Za-z0-9][A-Za-z0-9._/:-]{0,127}"
_LEAVE_SECONDS = 60.0


class ModuleBody(BaseModel):
    """Body of POST /admin/models: a directory on the server, and the name to serve it under.

    A LoRA adapter shares its prefill weights with other adapters; `merge` gives it weights of its own.
    """

    model_config = ConfigDict(extra="forbid")
    name: Annotated[str, Field(pattern=f"^{MODEL_NAME}$")]
    directory: Annotated[str, Field(min_length=1, max_length=4096)]
    merge: bool = False


def add_admin_routes(app: FastAPI, engine: Engine, thread: EngineThread, library: AdapterLibrary) -> None:
    def opened(body: ModuleBody) -> PrefillModule:
        if not body.merge and (Path(body.directory) / ADAPTER_CONFIG).is_file():
            return library.open(body.directory)
        return load_prefill(body.directory, engine.decode, engine.dtype)

    loading = asyncio.Lock()  # one at a time: weights are large

    @app.post("/admin/models", status_code=201, responses={400: DESCRIBED[400]})
    async def add(body: ModuleBody) -> dict[str, Any]:
        """Load a prefill module, check that it fits the decode module, and serve it."""
        if body.directory != DEMO and not Path(body.directory).is_dir():
            raise HttpError(400, f"{body.directory} is not a directory on the server", "directory")
        if body.name in engine.modules:
            raise HttpError(400, f"model {body.name!r} is already served; remove it first", "name")
        async with loading:
            try:
                module = await asyncio.to_thread(opened, body)
                await thread.call(engine.add_module, body.name, module)
            except Refused as refused:
                raise HttpError(503, str(refused)) from None
            except QsunError as error:
                raise HttpError(400, str(error), "directory") from None
            except (RuntimeError, OSError) as error:  # torch's lack of memory is the first
                raise HttpError(500, f"{body.directory} could not be loaded: {error}".partition("\n")[0]) from None
        return {"id": body.name, "object": "model"}

    @app.delete("/admin/models/{name:path}", responses={404: DESCRIBED[404]})
    async def remove(name: str) -> JSONResponse:
        """Refuse new requests for a model and unload it after the last one; 202 if that takes over a minute."""
        try:
            await thread.call(engine.remove_module, name)
        except Refused as refused:
            raise HttpError(404, str(refused)) from None
        for _ in range(int(_LEAVE_SECONDS / 0.05)):
            if name not in thread.state.models:
                return JSONResponse({"id": name, "deleted": True})
            await asyncio.sleep(0.05)
        return JSONResponse({"id": name, "deleted": False}, 202)
