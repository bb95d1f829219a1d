"""Compile a Triton kernel for a GPU that this machine lacks, and read its machine code.

Needs no GPU and no torch: Triton's wheel carries ptxas and cuobjdump.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.cache import get_cache_manager

_TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?);")


@dataclass(frozen=True)
class MachineCode:
    """What ptxas made of a kernel.

    names: of all instructions, in order.
    loop: the instructions of the longest backward branch.
    slack: the fewest instructions, around the loop, from one of its loads into registers to the first use of what it
        loaded; None without such loads.
    """

    registers: int
    stack_bytes: int
    shared_bytes: int
    listing: str
    names: list[str]
    loop: Counter[str]
    slack: int | None

    @property
    def instructions(self) -> Counter[str]:
        return Counter(self.names)

    def place(self, *prefixes: str) -> list[int]:
        """Where instructions whose name starts so are among all."""
        return [at for at, name in enumerate(self.names) if name.startswith(prefixes)]

    def waits_first(self, hints=0) -> bool:
        """Whether it waits for the kernels before it ahead of all that it reads and writes; prefetches are neither.

        hints: loads ahead of the wait, of what only prefetches go by.
        """
        waits, stores = self.place("ACQBULK"), self.place("STG", "ATOM", "RED", "ST.")
        ahead = [at for at in self.place("LDG", "LD.") if waits and at < waits[0]]
        return len(waits) == 1 and waits[0] < min(stores) and len(ahead) == hints

    def spills(self) -> bool:
        return self.stack_bytes > 0 or any(name.startswith(("LDL", "STL")) for name in self.instructions)

    def in_loop(self, prefix: str) -> int:
        """Instructions of the main loop whose name starts so."""
        return sum(n for name, n in self.loop.items() if name.startswith(prefix))

    def lane_instructions(self, warps: int, weights: int) -> float:
        """All instructions of one pass of the main loop, times its threads, over the weights that it covers."""
        return self.loop.total() * warps * 32 / weights


def compile_kernel(kernel, types, constants, capability, warps):
    """Compile for an NVIDIA compute capability, pointers 16-byte aligned.

    Args:
        kernel: a `triton.jit` function.
        types: {argument: Triton type}, "*" for pointers; a trailing "!" promises a multiple of 16.
        constants: {argument: compile-time value}.
    """
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types[n].rstrip("!") for n in names}
    aligned = [n for n in names if n not in constants and (types[n].startswith("*") or types[n].endswith("!"))]
    hints = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=hints)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "enable_fp_fusion": True}
    )
    listing = _disassembled(compiled.asm["cubin"])
    registers, stack = (int(re.search(rf"\b{name}:(\d+)", listing)[1]) for name in ("REG", "STACK"))
    code = [(int(m[1], 16), m[2], m[3]) for m in map(_INSTRUCTION.match, listing.splitlines()) if m]
    first, last = _main_loop(code)
    return MachineCode(
        registers=registers,
        stack_bytes=stack,
        shared_bytes=compiled.metadata.shared,
        listing=listing,
        names=[name for _, name, _ in code],
        loop=Counter(name for address, name, _ in code if first <= address <= last),
        slack=_slack([(name, operands) for address, name, operands in code if first <= address <= last]),
    )


def _disassembled(cubin):
    """Instructions and resources. They take half a second and are kept in Triton's cache, as the cubin itself is."""
    cache = get_cache_manager(sha256(triton.__version__.encode() + cubin).hexdigest())
    kept = cache.get_file("listing")
    if kept:
        return Path(kept).read_text()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [_TOOLS / "cuobjdump", "-sass", "-res-usage", file]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    listing = done.stdout + done.stderr
    cache.put(listing, "listing", binary=False)
    return listing


def _main_loop(code):
    """(first, last) address of the backward branch that spans most, of those with tensor cores where there are any."""
    loops = [(0, -1)]
    for address, name, operands in code:
        target = re.search(r"0x([0-9a-f]+)", operands) if name.startswith("BRA") else None
        if target and int(target[1], 16) < address:
            loops.append((int(target[1], 16), address))
    multiplies = [address for address, name, _ in code if name.startswith(("HMMA", "HGMMA"))]

    def size(loop):
        return any(loop[0] <= address <= loop[1] for address in multiplies), loop[1] - loop[0]

    return max(loops, key=size)


def _slack(loop):
    found = []
    for at, (name, operands) in enumerate(loop):
        if name.startswith("LDG.E"):
            register = re.match(r"R\d+", operands)[0]
            later = [*loop[at + 1 :], *loop[: at + 1]]
            uses = (i for i, (_, text) in enumerate(later) if re.search(rf",.*\b{register}\b", text))
            found.append(1 + next(uses, len(loop)))
    return min(found, default=None)
