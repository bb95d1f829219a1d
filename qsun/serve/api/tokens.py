"""POST /tokenize and /detokenize, as vLLM has them."""

from typing import Any

from fastapi import FastAPI

from qsun.errors import QsunError
from qsun.serve.api.bodies.tokens import DetokenizeBody, TokenizeBody
from qsun.serve.api.errors import DESCRIBED
from qsun.serve.api.prompts import PromptTokenizer
from qsun.serve.http.errors import HttpError


def add_token_routes(app: FastAPI, prompts: PromptTokenizer) -> None:
    tokenizer, positions = prompts.tokenizer, prompts.positions

    @app.post("/tokenize", responses={400: DESCRIBED[400]})
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        """Tokens of a prompt, or of a chat up to where the answer begins."""
        try:
            if body.prompt is None:
                tokens = await prompts.of_conversation(body)
            else:
                (tokens,) = await prompts.of_texts([body.prompt], body.add_special_tokens)
        except QsunError as error:
            raise HttpError(400, str(error)) from None
        return {"count": len(tokens), "max_model_len": positions, "tokens": tokens}

    @app.post("/detokenize", responses={400: DESCRIBED[400]})
    async def detokenize(body: DetokenizeBody) -> dict[str, str]:
        """Text of tokens."""
        if tokenizer is None:
            raise HttpError(400, "the model has no tokenizer")
        if body.tokens and max(body.tokens) >= len(tokenizer):
            raise HttpError(400, f"token {max(body.tokens)} is outside the vocabulary of {len(tokenizer)}", "tokens")
        return {"prompt": tokenizer.decode(body.tokens)}
