"""Requests as lm-eval makes them, and what the seam without a cache answers to a loglikelihood."""

import random

import torch
from lm_eval.api.instance import Instance

from tests.seam_oracle import seam_reference


def instances(kind, arguments):
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


SPLIT_TWICE = [("rev a", "bc>cba"), ("rev ab", "c>cba")]


def pairs(count=24, seed=0):
    """Contexts and continuations: none, short, long, of one token, choices of one context."""
    r = random.Random(seed)

    def text(low, high):
        return "".join(r.choice("abcdefgh 0123456789>+") for _ in range(r.randint(low, high)))

    drawn = [(text(0, 90), text(1, 30)) for _ in range(count)]
    choices = [("is 12+8 20 or 21>", choice) for choice in ("20", "21", "2", "20 of course", "20, not 21")]
    fixed = [("", "abc"), ("", "a"), ("calc 12+8>", "2"), ("x" * 300, "yz")]
    return [*fixed, *choices, *drawn]


def double(model):
    """State dict in float64; the weights of quantized layers as they are used."""
    state = {name: tensor.double() for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    for name, layer in model.named_modules():
        if hasattr(layer, "weight_in"):
            state[f"{name}.weight"] = layer.weight_in(torch.float64)
    return state


def brute_force(lm, context, continuation):
    """(log probability, whether it is greedy) from one pass over the whole sequence, in float64."""
    states = double(lm.prefill_module.model), double(lm.decode_module.model)
    logits = seam_reference(*states, lm.model.config, [*context, *continuation[:-1]], len(context))
    tokens = torch.tensor(continuation)
    log_probs = logits.log_softmax(-1).gather(-1, tokens[:, None])
    return float(log_probs.sum()), bool((logits.argmax(-1) == tokens).all())
