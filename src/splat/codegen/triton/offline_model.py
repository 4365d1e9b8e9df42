"""What is known of every GPU that is compiled for, and a model that ranks schedules by their inner loops.

The loops are read off the machine code, instruction by instruction.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splat.planning.target import TARGETS

if TYPE_CHECKING:
    from splat.codegen.triton.offline import Compiled


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What compiling for a kind of GPU takes. How fast it is stands in `splat.planning.target`.

    Attributes:
      backend, capability, warp_size: Triton's name of the target.
      shared_limit: bytes of shared memory (LDS) that one program may have.
      issues: instructions per cycle and SM (CU), counted in warps.
    """

    backend: str
    capability: int | str
    warp_size: int
    shared_limit: int
    issues: int


#: By the name that `Target.arch` and callers use.
ARCHITECTURES: Mapping[str, Architecture] = {
    "sm_80": Architecture("cuda", 80, 32, 163 << 10, issues=4),
    "sm_90": Architecture("cuda", 90, 32, 227 << 10, issues=4),
    "sm_100": Architecture("cuda", 100, 32, 227 << 10, issues=4),
    # A SIMD has 16 lanes, so that a wave of 64 keeps it for four cycles: one a cycle for the four SIMDs of a CU.
    "gfx942": Architecture("hip", "gfx942", 64, 64 << 10, issues=1),
}


@dataclasses.dataclass(frozen=True)
class Loop:
    """An innermost loop that does a tile's products. Both sides of a branch in it are counted.

    Attributes:
      instructions: of one round, per warp; loops that wait for a barrier inside it are left out.
      mix: the same by kind, the keys being those of `_KINDS` and "other".
    """

    instructions: int
    mix: dict[str, int]


#: Kinds of SASS and GCN mnemonics; the first that matches counts.
_KINDS = {
    "tensor": r"(HG|QG|IG|H|I|D|Q|O|UTCH|UTCQ|UTCI)MMA|v_s?mfma.*",
    "special": r"MUFU|v_(exp|log|rcp|rsq|sqrt|sin|cos)_.*",
    "convert": r"F2F|F2FP|F2I|I2F|I2FP|v_cvt.*",
    "float": r"(F|H|HF)(ADD|MUL|FMA|MA|MNMX|SETP|SET|SEL|SWZADD)2?3?|FCHK|v_.*_f(16|32)(_e\d+)?",
    "spill": r"STL|LDL|scratch_.*",
    "shared": r"LDS|LDSM|STS|STSM|ATOMS|LDTM|STTM|ds_.*",
    "global": r"LDG|STG|LDGSTS|UTMALDG|UTMASTG|UBLKCP|LD|ST|(buffer|global|flat)_.*",
    "move": r"U?MOV|U?PRMT|R2UR|S2U?R|CS2R|SHFL|v_(mov|accvgpr|perm|readlane|readfirstlane)_?.*",
    "sync": r"(BAR|SYNC|WARP|FENCE|MEMBAR|(LDG)?DEPBAR|BSSY|BSYNC|ELECT|VOTE).*|s_(waitcnt|barrier|nop).*",
    "control": r"BRA|EXIT|CALL|RET|NOP|s_c?branch.*|s_endpgm",
    "scalar": r"s_.*",
    "integer": r"U?(IADD|IMAD|LOP|ISETP|LEA|SHF|SEL|PLOP|IMNMX|IABS|FLO|POPC|SGXT|BMSK|VIADD|VIMNMX).*|v_.*",
}

_SASS = r"\s*(?P<label>\.L_\w+):|\s*/\*[0-9a-f]{4,}\*/\s+(?P<code>.*?)\s*;"
_GCN = r"(?P<label>\.LBB\w+):|\s+(?P<code>(?:s|v|ds|buffer|global|flat|scratch)_\S.*)"
_BRANCH = r"(?P<guard>@!?\w+ )?(?P<name>BRA[.\w]*|s_c?branch\w*)\s+(?P<operands>.*?)`?\(?(?P<label>\.L\w+)"
_END = r"EXIT|RET|s_endpgm"


def loop_instructions(compiled: Compiled) -> list[Loop] | None:
    """The kernel's innermost loops that hold tensor-core instructions, in the order of the program.

    Of a kernel without any, those that hold exponentials: its products are ordinary multiply-adds.
    None where Triton's nvdisasm is missing, which NVIDIA's binaries take.
    """
    if ARCHITECTURES[compiled.arch].backend == "hip":
        return _loops(compiled.assembly, _GCN)
    knobs: Any = importlib.import_module("triton.knobs")
    try:
        tool = knobs.nvidia.nvdisasm.path
    except RuntimeError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(compiled.binary)
        text = subprocess.run([tool, "-c", binary], check=True, capture_output=True, text=True).stdout
    return _loops(text, _SASS)


def cycles_per_tile(loop: Loop, *, arch: str, flops: float, num_warps: int, dtype: str = "bfloat16") -> float:
    """Modelled cycles that one SM (CU) spends on one round of a loop, that is on one tile of scores.

        cycles = tensor + max(special, issue)
        tensor = flops / tensor-core operations of a cycle; 0 where the products are among the instructions
        special = special instructions * num_warps * warp_size / special results of a cycle
        issue = instructions * num_warps / issue slots

    Rates are those of the first device of that `arch` in `splat.planning.target.TARGETS`. Memory is taken to keep up,
    and the two terms not to overlap, though a second program on the SM or warp specialisation may hide the smaller.
    The model was made for Hopper. It ranks schedules of one kernel on one GPU and does not predict times.

    Args:
      flops: floating-point operations of the round's matrix products, a multiply-add being two: block_q * block_kv *
        head_dim times 4 forward, 6 for the gradient of queries, 8 for that of keys and values.
      dtype: of the products' inputs.
    """
    about = ARCHITECTURES[arch]
    device = next(target for target in TARGETS.values() if target.arch == arch)
    cycles = device.units * device.clock_hz  # of all SMs, per second
    special = loop.mix.get("special", 0) * num_warps * about.warp_size / (device.exp_per_s / cycles)
    # GCN's scalar instructions issue beside the others.
    issue = (loop.instructions - loop.mix.get("scalar", 0)) * num_warps / about.issues
    tensor = flops / (device.matmul_flops[dtype] / cycles) if loop.mix.get("tensor") else 0.0
    return tensor + max(special, issue)


# -- control flow ------------------------------------------------------------------------------------------------------


def _loops(text: str, syntax: str) -> list[Loop]:
    blocks, successors = _blocks(text, syntax)
    names = [[_kind(code) for code in block] for block in blocks]
    every = _natural_loops(successors)
    telling = "tensor" if any("tensor" in block for block in names) else "special"
    working = [body for body in every if any(telling in names[block] for block in body)]
    found = []
    for body in sorted(working, key=min):
        inner = [other for other in every if other < body]
        if not any(other in working for other in inner):
            # Waiting for a barrier is a loop of its own, which is not expected to turn.
            own = body.difference(*inner)
            mix = collections.Counter(name for block in own for name in names[block])
            found.append(Loop(mix.total(), dict(mix)))
    return found


def _kind(code: str) -> str:
    name = re.sub(r"^@!?\w+\s+", "", code).split()[0].split(".")[0]
    return next((kind for kind, expression in _KINDS.items() if re.fullmatch(expression, name)), "other")


def _blocks(text: str, syntax: str) -> tuple[list[list[str]], list[set[int]]]:
    """Basic blocks of an assembly text and, for each, those that may follow it."""
    blocks: list[list[str]] = [[]]
    labels: dict[str, int] = {}
    for match in re.finditer(syntax, text, re.MULTILINE):
        if match["label"]:
            blocks.append([])
            labels[match["label"]] = len(blocks) - 1
        else:
            blocks[-1].append(match["code"])
            if re.match(rf"(@!?\w+ )?({_END})\b|{_BRANCH}", match["code"]):
                blocks.append([])
    successors: list[set[int]] = []
    for index, block in enumerate(blocks):
        last = block[-1] if block else ""
        branch = re.match(_BRANCH, last)
        targets = {labels[branch["label"]]} if branch and branch["label"] in labels else set()
        # An operand before the label is a condition too: `BRA.U !UP0, ...`.
        always = branch and not branch["guard"] and not branch["operands"] and branch["name"] in ("BRA", "s_branch")
        if not always and not re.match(_END, last) and index + 1 < len(blocks):
            targets.add(index + 1)
        successors.append(targets)
    return blocks, successors


def _natural_loops(successors: list[set[int]]) -> list[frozenset[int]]:
    """The blocks of every loop. A loop is what can reach the source of an edge whose target dominates its source.

    A branch backwards alone is none: ptxas puts the slow paths of barriers behind the program, and they jump back.
    """
    predecessors: list[list[int]] = [[] for _ in successors]
    for source, targets in enumerate(successors):
        for target in targets:
            predecessors[target].append(source)
    # Sets of blocks are the bits of integers.
    dominators = [1, *[(1 << len(successors)) - 1] * (len(successors) - 1)]
    changed = True
    while changed:
        changed = False
        for block in range(1, len(successors)):
            meet = (1 << len(successors)) - 1
            for predecessor in predecessors[block]:
                meet &= dominators[predecessor]
            meet |= 1 << block
            changed |= meet != dominators[block]
            dominators[block] = meet
    bodies: dict[int, frozenset[int]] = {}
    for source, targets in enumerate(successors):
        for header in targets:
            if dominators[source] >> header & 1:
                bodies[header] = bodies.get(header, frozenset()) | {header, *_reaching(source, header, predecessors)}
    return list(bodies.values())


def _reaching(block: int, stop: int, predecessors: list[list[int]]) -> Iterator[int]:
    """The blocks from which `block` can be reached without passing `stop`."""
    seen, left = {stop}, [block]
    while left:
        block = left.pop()
        if block not in seen:
            seen.add(block)
            left += predecessors[block]
            yield block
