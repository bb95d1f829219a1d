"""Pretrain the demo base from scratch on a CPU: `python -m qsun.demo.pretrain -o DIR`.

The packaged directory is this script's output with its defaults, so anyone can rebuild it in minutes and check where it
comes from. A run is deterministic for a seed, a machine and a version of torch; another CPU may round differently.

Two choices make minutes enough: hidden matrices are trained with Muon (`muon.py`), and nearly all of the loss is on
responses, because prompts are random strings whose entropy no model can lower.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from qsun.demo.corpus import FAMILIES, calibration_text, document, family_document, natural_passage
from qsun.demo.muon import BatchedMuon
from qsun.demo.score import exact_match, response_loss
from qsun.demo.tokenizer import (
    BOS_ID,
    EOS_ID,
    PAD_ID,
    VOCABULARY_SIZE,
    build_tokenizer,
    character_ids,
    save_tokenizer,
)

MAX_POSITIONS = 512
PROMPT_WEIGHT = 0.03
NATURAL_WEIGHT = 0.3
# Longer responses share this much weight, or JSON would outweigh the two characters of a sum.
FULL_WEIGHT_CHARACTERS = 8
REPORT_EVERY = 100


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that determines the weights, apart from the version of torch and the machine."""

    steps: int = 2400
    seed: int = 0
    batch_tokens: int = 1536
    # Short windows train fastest; one step in eight covers every position that the configuration allows.
    window_lengths: tuple[int, ...] = (*[128] * 7, MAX_POSITIONS)
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    warmup_steps: int = 40
    decay_share: float = 0.4

    def __post_init__(self) -> None:
        """Reject settings that would fail in the middle of a run."""
        if self.steps < 1:
            raise ValueError(f"steps {self.steps} is below 1; give at least one step")
        if max(self.window_lengths) > min(MAX_POSITIONS, self.batch_tokens):
            raise ValueError(f"window_lengths {self.window_lengths} exceed {MAX_POSITIONS} or batch_tokens")

    def lr_factor(self, step: int) -> float:
        """Warm up, hold, then decay linearly to nothing over the last `decay_share` of the steps."""
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        return warmup * min(1.0, (self.steps - step) / max(1.0, self.decay_share * self.steps))


def build_model(seed: int) -> LlamaForCausalLM:
    """Return the untrained base in float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    return LlamaForCausalLM(config)


def training_window(rng: Random, length: int) -> tuple[list[int], list[float]]:
    """Pack documents into `length` + 1 ids, and the loss weight of predicting each of them."""
    ids: list[int] = []
    weights: list[float] = []
    while len(ids) <= length:
        prompt, response = document(rng)
        opening, answer = character_ids(prompt), [*character_ids(response), EOS_ID]
        weight = min(1.0, FULL_WEIGHT_CHARACTERS / len(answer)) if prompt else NATURAL_WEIGHT
        ids += [BOS_ID, *opening, *answer]
        weights += [0.0, *[PROMPT_WEIGHT] * len(opening), *[weight] * len(answer)]
    return ids[: length + 1], weights[: length + 1]


def weighted_loss(model: LlamaForCausalLM, ids: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean cross entropy of (B, T + 1) ids."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def pretrain_base(config: PretrainConfig, report: Callable[[int, float], None]) -> LlamaForCausalLM:
    """Train a base; `report` gets the step and the mean loss since its last call."""
    model = build_model(config.seed)
    model.train()
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = BatchedMuon(hidden)
    adam = torch.optim.AdamW(others, lr=config.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    rng = Random(config.seed)
    losses: list[float] = []
    for step in range(config.steps):
        length = config.window_lengths[step % len(config.window_lengths)]
        windows = [training_window(rng, length) for _ in range(config.batch_tokens // length)]
        ids, weights = (torch.tensor(column) for column in zip(*windows, strict=True))
        loss = weighted_loss(model, ids, weights)
        model.zero_grad()
        torch.autograd.backward(loss)
        factor = config.lr_factor(step)
        muon.step(lr=config.muon_lr * factor, momentum=0.85 + 0.1 * min(1.0, step / 200))
        adam.param_groups[0]["lr"] = config.adam_lr * factor
        adam.step()
        losses.append(loss.item())
        if (step + 1) % REPORT_EVERY == 0 or step + 1 == config.steps:
            report(step + 1, sum(losses) / len(losses))
            losses.clear()
    model.train(mode=False)
    return model


def write_base(model: LlamaForCausalLM, directory: Path) -> None:
    """Write a plain Hugging Face directory in bfloat16."""
    model.bfloat16().save_pretrained(directory)
    save_tokenizer(build_tokenizer(max_length=MAX_POSITIONS), directory)
    # safetensors makes files readable by their owner only; an installed package is read by everyone.
    (directory / "model.safetensors").chmod(0o644)


def build(config: PretrainConfig, output: Path, report: Callable[[int, float], None]) -> None:
    """Train, and write output/base and output/calibration.txt: the two things that are packaged."""
    write_base(pretrain_base(config, report), output / "base")
    # Not training's seed, or calibration would repeat the documents of its first steps.
    text = calibration_text(config.seed + 1)
    (output / "calibration.txt").write_text(text, encoding="ascii", newline="\n")


def measure(model: LlamaForCausalLM, *, seed: int = 1, count: int = 500) -> dict[str, float]:
    """Score each family on both sides of the split, and the loss on natural text."""
    scores: dict[str, float] = {}
    for family in FAMILIES:
        for held_out in (False, True):
            rng = Random(seed)
            documents = [family_document(rng, family, held_out=held_out) for _ in range(count)]
            key = f"{family} {'held out' if held_out else 'trained'}"
            scores[f"{key} exact match"] = round(exact_match(model, documents), 3)
            scores[f"{key} loss"] = round(response_loss(model, documents), 4)
    rng = Random(seed)
    scores["natural loss"] = round(response_loss(model, [("", natural_passage(rng)) for _ in range(count)]), 4)
    return scores


def main(arguments: list[str] | None = None) -> None:
    """Build the directory that the command line names, and print how the saved weights score."""
    parser = argparse.ArgumentParser(prog="python -m qsun.demo.pretrain", description="Pretrain the demo base.")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", type=int, default=PretrainConfig.steps)
    parser.add_argument("--seed", type=int, default=PretrainConfig.seed)
    options = parser.parse_args(arguments)
    config = PretrainConfig(steps=options.steps, seed=options.seed)

    torch.set_num_threads(1)  # The sums of several threads would depend on the number of cores.
    begin = time.process_time()

    def report(step: int, loss: float) -> None:
        print(
            f"step {step}/{config.steps}  loss {loss:.4f}  cpu {time.process_time() - begin:.0f} s",
            flush=True,
        )

    build(config, options.output, report)
    written = LlamaForCausalLM.from_pretrained(options.output / "base", dtype=torch.float32)
    print(json.dumps(measure(written), indent=2))


if __name__ == "__main__":
    main()
