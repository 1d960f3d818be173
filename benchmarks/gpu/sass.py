"""Counts the instructions that a CUDA kernel executes per class, from its machine code: what can be said of speed without a GPU.

    scripts/sass                     every kernel of the libpykd_cuda that pykd is installed with, for compute capability 9.0
    scripts/sass --all               its edges and exchanges too: MEMBARs, spills, all loops
    scripts/sass FILE --arch 80      another library or .cubin

How the loops are found: nvdisasm prints the code; labels and branches make it a graph; an edge back to a block that dominates its origin
makes a loop. Of the loops that hold no other one, those with 16-byte accesses go over the rows. Through such a loop leads a path for
what is ordinary, and others for what is rare, as a new maximum. Counted is the path with the most 16-byte accesses, and of these the one
with the fewest instructions. One iteration takes as many classes as its 16-byte stores hold, or its loads of one tensor.

A row goes through copying into shared memory and sweeps over what lies there; its instructions are those of the most costly loops that
can follow each other. Loops that also know single elements, of incomplete chunks, are those for what does not fit into shared memory:
they are counted apart ("long rows"), along the path with the most 16-byte accesses to device memory.
"""

import argparse
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

LANES = {"Float32": 4, "Float16": 8, "Bfloat16": 8}  # classes in 16 bytes


class Unavailable(RuntimeError):
    """What is needed to read machine code is not here."""


# ---- The tools ----------------------------------------------------------------------------------


def tool(name: str) -> str:
    """The path of a CUDA tool: on the PATH, of CUDA_HOME, or of a wheel (nvidia-cuda-nvdisasm, nvidia-cuda-cuobjdump)."""
    wheels = sorted(Path(sysconfig.get_path("platlib"), "nvidia").glob("*/bin"))
    folders = [os.environ.get("PATH", ""), f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin", *map(str, wheels)]
    found = shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        raise Unavailable(
            f"expected CUDA's {name}, got none on the PATH; install the package nvidia-cuda-{name}, or name a CUDA toolkit "
            "in the environment variable CUDA_HOME"
        )
    return found


def installed_library() -> Path:
    """The libpykd_cuda of the installed pykd."""
    import pykd

    path = Path(pykd.__path__[0], "lib", "libpykd_cuda.so")
    path = path if path.exists() else Path(sysconfig.get_path("platlib"), "pykd", "lib", "libpykd_cuda.so")
    if not path.exists():
        raise Unavailable(f"expected {path}, got no such file; build pykd where nvcc is")
    return path


def disassembly(file: Path, architecture: int) -> str:
    """All of a library's kernels, or a cubin's."""
    if file.suffix == ".cubin":
        return _output(tool("nvdisasm"), "-c", str(file.resolve()))
    environment = {**os.environ, "PATH": f"{Path(tool('nvdisasm')).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [tool("cuobjdump"), "-xelf", "all", str(file.resolve())],
            cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        cubins = sorted(Path(folder).glob(f"*.sm_{architecture}.cubin"))
        if not cubins:
            raise Unavailable(f"expected machine code for sm_{architecture} in {file}, got none")
        return "\n".join(_output(tool("nvdisasm"), "-c", str(cubin)) for cubin in cubins)


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


# ---- The code as a graph ------------------------------------------------------------------------

INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;(.*)")
LABEL = re.compile(r"(\.L_x_\d+):")
NO_FALL_THROUGH = ("EXIT", "BRA", "BRX", "JMP", "JMX", "RET", "KILL", "BPT")


@dataclasses.dataclass
class Instruction:
    """One, with where it may jump to."""

    predicate: str
    name: str
    operands: str
    targets: tuple[str, ...]

    @property
    def memory(self) -> str:
        """Its name without what follows: LDG reads device memory, LDS shared memory."""
        return self.name.split(".")[0]

    @property
    def wide(self) -> bool:
        """Whether it moves 16 bytes."""
        return ".128" in self.name

    @property
    def goes_on(self) -> bool:
        """Whether the next instruction may follow."""
        if self.memory not in NO_FALL_THROUGH:
            return True
        # Besides the predicate before it, a branch can have one among its operands.
        return bool(self.predicate) or ".DIV" in self.name or re.search(r"\bU?P\d\b", self.operands) is not None

    @property
    def ends_block(self) -> bool:
        return self.memory in NO_FALL_THROUGH


@dataclasses.dataclass
class Loop:
    """An innermost loop, and the path through it that is counted."""

    head: int
    path: list[Instruction]
    elements: bool  # whether a path of it takes single ones from or to device memory

    def count(self, *names: str) -> int:
        """How many 16-byte instructions of these names."""
        return sum(i.wide and i.memory in names for i in self.path)

    @property
    def kind(self) -> str:
        if self.elements:
            return "rest" if self.count("LDG") else ""
        if self.count("LDGSTS"):
            return "copy"
        # What threads leave for each other is 16 bytes wide, too, but there is nothing to compute.
        computes = any(i.memory in ("FFMA", "FMUL", "MUFU") for i in self.path)
        return "shared" if self.count("LDS") and computes else ""

    @property
    def loads(self) -> int:
        return self.count("LDGSTS") or self.count("LDS") or self.count("LDG")

    def classes(self, lanes: int, tensors: int) -> float:
        """That one iteration takes: as many as it writes, or reads of one tensor."""
        return lanes * (self.count("STG") or self.loads / tensors)

    def per_class(self, lanes: int, tensors: int) -> float:
        return len(self.path) / self.classes(lanes, tensors)

    def exponentials(self, lanes: int, tensors: int) -> float:
        """Per class."""
        return sum(i.name == "MUFU.EX2" for i in self.path) / self.classes(lanes, tensors)


@dataclasses.dataclass
class Function:
    """The machine code of one kernel."""

    name: str  # mangled
    registers: int
    instructions: list[Instruction]
    labels: dict[str, int]  # index of the instruction that follows

    @cached_property
    def blocks(self) -> dict[int, range]:
        """By their first instruction."""
        starts = {0, *self.labels.values()}
        starts |= {i + 1 for i, instruction in enumerate(self.instructions) if instruction.ends_block}
        ordered = sorted(start for start in starts if start < len(self.instructions))
        ends = [*ordered[1:], len(self.instructions)]
        return {start: range(start, end) for start, end in zip(ordered, ends, strict=True)}

    @cached_property
    def successors(self) -> dict[int, list[int]]:
        found = {}
        for start, block in self.blocks.items():
            last = self.instructions[block[-1]]
            following = [self.labels[target] for target in last.targets] if last.ends_block else []
            if last.goes_on and block.stop in self.blocks:
                following.append(block.stop)
            found[start] = [target for target in following if target in self.blocks]
        return found

    @cached_property
    def predecessors(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {start: [] for start in self.blocks}
        for start, following in self.successors.items():
            for target in following:
                found[target].append(start)
        return found

    @cached_property
    def order(self) -> list[int]:
        """What can be reached, each block before those that follow it, but for edges back."""
        done: set[int] = set()
        found: list[int] = []
        stack: list[tuple[int, Iterator[int]]] = [(0, iter(self.successors[0]))]
        done.add(0)
        while stack:
            block, following = stack[-1]
            target = next((t for t in following if t not in done), None)
            if target is None:
                found.append(block)
                stack.pop()
            else:
                done.add(target)
                stack.append((target, iter(self.successors[target])))
        return found[::-1]

    @cached_property
    def dominators(self) -> dict[int, set[int]]:
        every = set(self.order)
        found = dict.fromkeys(self.order, every)
        found[0] = {0}
        changed = True
        while changed:
            changed = False
            for block in self.order[1:]:
                before = [found[p] for p in self.predecessors[block] if p in every]
                now = set.intersection(*before) | {block}
                if now != found[block]:
                    found[block], changed = now, True
        return found

    @cached_property
    def loops(self) -> list[Loop]:
        """Those that hold no other one."""
        bodies: dict[int, set[int]] = {}
        for block in self.order:
            for head in self.successors[block]:
                if head in self.dominators[block]:
                    bodies.setdefault(head, set()).update(self._body(head, block))
        inner = [head for head, body in bodies.items() if not any(other in body for other in bodies if other != head)]
        return [self._loop(head, bodies[head]) for head in sorted(inner)]

    def _body(self, head: int, last: int) -> set[int]:
        found, waiting = {head}, [last]
        while waiting:
            block = waiting.pop()
            if block not in found:
                found.add(block)
                waiting += [p for p in self.predecessors[block] if p in self.dominators]
        return found

    def _loop(self, head: int, body: set[int]) -> Loop:
        code = {block: [self.instructions[i] for i in self.blocks[block]] for block in self.order if block in body}
        elements = any(i.memory in ("LDG", "STG") and not i.wide for own in code.values() for i in own)
        best: dict[int, tuple[tuple[int, int], list[int]]] = {}
        closed = []
        for block, own in code.items():
            before = [best[p] for p in self.predecessors[block] if p in best] if block != head else [((0, 0), [])]
            if not before:
                continue
            (accesses, length), way = max(before)
            accesses += sum(i.wide and (i.memory in ("LDG", "STG") or not elements) for i in own)
            best[block] = ((accesses, length - len(own)), [*way, block])
            if head in self.successors[block]:
                closed.append(best[block])
        return Loop(head, [i for block in max(closed)[1] for i in code[block]], elements)

    # ---- What is asked of it ----

    def count(self, name: str) -> int:
        return sum(instruction.memory == name for instruction in self.instructions)

    @property
    def spills(self) -> int:
        return self.count("LDL") + self.count("STL")

    @property
    def fences_after_stores(self) -> int:
        """MEMBARs that are reached from a store to device memory: they wait for it."""
        reached: set[int] = set()
        found: set[int] = set()
        for block in self.order:
            stored = False
            for i in self.blocks[block]:
                name = self.instructions[i].memory
                stored = stored or name in ("STG", "ST")
                if stored and name == "MEMBAR":
                    found.add(i)
            if stored:
                reached |= self._after(block)
        for block in reached:
            found |= {i for i in self.blocks[block] if self.instructions[i].memory == "MEMBAR"}
        return len(found)

    def _after(self, block: int, back: bool = True) -> set[int]:
        """The blocks that may follow; back=False: without going back to the head of a loop."""
        found: set[int] = set()
        waiting = [block]
        while waiting:
            here = waiting.pop()
            for following in self.successors[here]:
                if following not in found and (back or following not in self.dominators[here]):
                    found.add(following)
                    waiting.append(following)
        return found

    def chain(self, lanes: int, tensors: int, kinds: Iterable[str]) -> list[Loop]:
        """The most costly loops of these kinds that can follow each other."""
        loops = [loop for loop in self.loops if loop.kind and loop.kind in kinds]
        after = {loop.head: self._after(loop.head, back=False) for loop in loops}
        best: dict[int, list[Loop]] = {}

        def cost(chain: list[Loop]) -> float:
            return sum(loop.per_class(lanes, tensors) for loop in chain)

        # Those after which the most can follow come first.
        for loop in sorted(loops, key=lambda loop: -len(after[loop.head])):
            before = [
                best[o.head]
                for o in loops
                if o.head in best and loop.head in after[o.head] and o.head not in after[loop.head]
            ]
            best[loop.head] = [*max(before, key=cost, default=[]), loop]
        return max(best.values(), key=cost, default=[])


def functions(text: str) -> list[Function]:
    """Every kernel of a disassembly."""
    found: list[Function] = []
    current: Function | None = None
    for line in text.splitlines():
        section = re.match(r"\s*\.section\s+\.text\.(\S+?),", line)
        if section:
            current = Function(section[1], 0, [], {})
            found.append(current)
            continue
        if re.match(r"\s*\.section", line):
            current = None
        if current is None:
            continue
        label = LABEL.match(line)
        if label:
            current.labels[label[1]] = len(current.instructions)
            continue
        instruction = INSTRUCTION.match(line)
        if instruction:
            targets = tuple(re.findall(r"\.L_x_\d+", instruction[3] + instruction[4]))
            current.instructions.append(Instruction(instruction[1] or "", instruction[2], instruction[3], targets))
            used = [int(r) + 1 for r in re.findall(r"\bR(\d+)\b", instruction[3])]
            current.registers = max([current.registers, *used])
    return found


# ---- The table ----------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
    """What is said of one kernel."""

    kernel: str
    registers: int
    spills: int  # loads and stores of registers that did not fit
    fences: int  # MEMBARs behind stores
    loops: list[float]  # instructions per class of the loops over shared memory, copying first
    exponentials: float  # per class, in these loops
    long_rows: list[float]  # of the loops over device memory

    @property
    def per_class(self) -> float | None:
        return sum(self.loops) if self.loops else None


def demangled(names: Sequence[str]) -> list[str]:
    if shutil.which("c++filt") is None:
        raise Unavailable("expected c++filt, of binutils, got none on the PATH")
    return _output("c++filt", *names).splitlines()


def row_of(function: Function, name: str) -> Row:
    short = re.sub(r"^void |pykd::kernels::|gpu::|\((\w|::)*\)(?=\d)", "", re.sub(r">\([^>]*$", ">", name))
    lanes = next((LANES[dtype] for dtype in LANES if f"<{dtype}" in short), 4)
    tensors = 1 if "-1" in short else 2  # without a teacher
    staged = function.chain(lanes, tensors, ("copy", "shared"))
    long_rows = function.chain(lanes, tensors + ("true" in short), ("rest",))  # label_probs are never staged
    return Row(
        short, function.registers, function.spills, function.fences_after_stores,
        [loop.per_class(lanes, tensors) for loop in staged],
        sum(loop.exponentials(lanes, tensors) for loop in staged),
        [loop.per_class(lanes, tensors + ("true" in short)) for loop in long_rows],
    )  # fmt: skip


def rows(file: Path | None = None, architecture: int = 90) -> list[Row]:
    """Of every kernel in a library."""
    found = functions(disassembly(file or installed_library(), architecture))
    names = demangled([function.name for function in found])
    return sorted((row_of(f, n) for f, n in zip(found, names, strict=True)), key=lambda row: row.kernel)


def shown(loops: Sequence[float]) -> str:
    """The sum, and what it is the sum of."""
    return f"{sum(loops):.1f} = {' + '.join(f'{x:.1f}' for x in loops)}" if loops else "–"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/sass", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "file", nargs="?", type=Path, help="a library or a .cubin; otherwise the installed libpykd_cuda"
    )
    parser.add_argument("--arch", type=int, default=90, help="compute capability (90)")
    parser.add_argument("--loops", metavar="KERNEL", help="print the counted paths of kernels whose name holds this")
    arguments = parser.parse_args()
    try:
        file = arguments.file or installed_library()
        if arguments.loops:
            found = functions(disassembly(file, arguments.arch))
            for function, name in zip(found, demangled([f.name for f in found]), strict=True):
                for loop in function.loops if arguments.loops in name else ():
                    print(
                        f"{name}\n  {loop.kind or 'other'}: {len(loop.path)} instructions, {loop.loads} 16-byte loads"
                    )
                    if loop.kind:
                        print("".join(f"    {i.predicate:5} {i.name} {i.operands}\n" for i in loop.path))
            return 0
        print(
            f"{'instructions per class':<30} {'long rows':<22} {'exp2':>5} {'regs':>5} {'spills':>7} {'MEMBAR':>7}  kernel"
        )
        for row in rows(file, arguments.arch):
            numbers = f"{row.exponentials:>5.1f} {row.registers:>5} {row.spills:>7} {row.fences:>7}"
            print(f"{shown(row.loops):<30} {shown(row.long_rows):<22} {numbers}  {row.kernel}")
    except Unavailable as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
