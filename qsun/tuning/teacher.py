"""A loaded teacher: its next-token distributions, and its own answers to prompts without a response."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qsun.engine.generation import generate_stream
from qsun.engine.requests import most_new_tokens
from qsun.errors import QsunError
from qsun.model.lora import ADAPTER_CONFIG, adapter_base
from qsun.model.output_dir import Workdir
from qsun.model.skeleton import read_model_config
from qsun.progress import Progress
from qsun.runtime.decode_module import DecodeModule, load_decode
from qsun.runtime.prefill_module import PrefillModule, load_prefill, load_with_adapter
from qsun.runtime.seam import SeamBatch, monolithic_hidden, seam_hidden
from qsun.tuning.job import TuneJob
from qsun.tuning.processes import Processes
from qsun.tuning.start import TeacherPlan

_PART = "answers"  # of the working directory
_BATCHES_IN_A_PART = 16  # the last batch of each has empty places


@dataclass(frozen=True)
class Teacher:
    """A SUN pair, or one whole model, which is then both of its modules."""

    prefill: PrefillModule
    decode: DecodeModule

    @torch.no_grad()
    def states(self, batch: SeamBatch) -> tuple[Any, Tensor]:
        """Return the model whose head predicts, and its hidden states (B, R, hidden size) at the response tokens."""
        prefill, decode = self.prefill.model, self.decode.model
        alone = prefill is decode
        return decode, monolithic_hidden(decode, batch) if alone else seam_hidden(prefill, decode, batch)


def load_teacher(plan: TeacherPlan, device: torch.device, dtype: torch.dtype) -> Teacher:
    """Load a teacher to compute in this dtype."""
    if plan.decode is not None:
        decode = load_decode(plan.decode, device, dtype)
        return Teacher(load_prefill(plan.directory, decode, dtype), decode)
    if (plan.directory / ADAPTER_CONFIG).exists():
        merged = load_with_adapter(adapter_base(plan.directory), plan.directory, device, dtype)
        whole = DecodeModule(merged, plan.directory)
    else:
        whole = load_decode(plan.directory, device, dtype)
    return Teacher(PrefillModule(whole.model, plan.directory), whole)


def answer_prompts(job: TuneJob, work: Workdir, processes: Processes, progress: Progress) -> TuneJob:
    """Return the job with the teacher's greedy answers where examples have no response; a resumed run keeps them.

    Raises:
        QsunError: the teacher answers a prompt with nothing but Inf or NaN.
    """
    examples = [*job.train, *job.valid]
    missing = [example.prompt for example in examples if not example.response]
    if not missing or job.teacher is None:
        return job
    if processes.first and not work.finished(_PART):
        teacher = load_teacher(job.teacher, processes.device, job.dtype)
        work.note(_PART, {"answers": _answers(teacher, missing, job, work, progress)})
    processes.wait_until(lambda: work.finished(_PART))
    given = iter(work.record(_PART)["answers"])
    filled = [e if e.response else replace(e, response=tuple(next(given))) for e in examples]
    return replace(job, train=filled[: len(job.train)], valid=filled[len(job.train) :])


def _answers(
    teacher: Teacher, prompts: Sequence[Sequence[int]], job: TuneJob, work: Workdir, progress: Progress
) -> list[list[int]]:
    """Answer all prompts, a part at a time, each of which is kept when it is done."""
    answers: list[list[int]] = [[] for _ in prompts]
    ended = 0

    def tell() -> None:
        nonlocal ended
        ended += 1
        progress("the teacher answers", ended, len(prompts))

    for index, (most, numbers) in enumerate(_parts(prompts, job)):
        name = f"{_PART}-{index:06d}"
        if work.finished(name):
            ended += len(numbers)
        else:
            given = _answer(teacher, [prompts[n] for n in numbers], most, job.config.batch_size, tell)
            if [] in given:
                raise QsunError(
                    f"teacher {job.names['teacher']} gives no answer to prompt {numbers[given.index([])]} of "
                    f"{len(prompts)}; drop it"
                )
            work.note(name, {"answers": given})
        for number, answer in zip(numbers, work.record(name)["answers"], strict=True):
            answers[number] = answer
    return answers


def _answer(
    teacher: Teacher, prompts: list[Sequence[int]], most: int, batch_size: int, tell: Callable[[], None]
) -> list[list[int]]:
    """Answer prompts with at most so many tokens each. tell: called at the end of each answer."""
    answers: list[list[int]] = [[] for _ in prompts]
    given = generate_stream(
        teacher.prefill, teacher.decode, prompts, max_new_tokens=most, detokenize=False, batch_size=batch_size
    )
    for piece in given:
        answers[piece.prompt] += piece.tokens
        if piece.finish:
            tell()
    return answers


def _parts(prompts: Sequence[Sequence[int]], job: TuneJob) -> Iterator[tuple[int, list[int]]]:
    """Share prompts out into parts, of the same room for answers each.

    A resumed run has the same parts, so that a prompt is answered beside the same others.
    Yields:
        The most tokens of an answer, and the numbers of the prompts.
    """
    shapes = [read_model_config(job.base), *([] if job.teacher is None else job.teacher.shapes)]
    limit = job.config.max_len - 1  # an example's last token is never read
    rooms: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        room = min(most_new_tokens(shape, limit, len(prompt)) for shape in shapes)
        rooms.setdefault(min(job.config.teacher_tokens, room), []).append(number)
    size = _BATCHES_IN_A_PART * job.config.batch_size
    for most, numbers in rooms.items():
        for first in range(0, len(numbers), size):
            yield most, numbers[first : first + size]
