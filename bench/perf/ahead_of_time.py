"""Compile every Triton kernel ahead of time, without a GPU: registers, spills, shared memory.

    python -m errata.bench.perf.ahead_of_time [report.json [dtype ...]]

One row per kernel, launch configuration and architecture, in a JSON report and a table.
These are facts about machine code, not about speed.
"""

import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from errata.kernels.codebook import triton as codebook
from errata.kernels.grouped_lora import triton as grouped_lora
from errata.kernels.lora_moe import triton as lora_moe

ARCHITECTURES = {80: 166_912, 90: 232_448}  # bytes of shared memory that one block can have
DTYPES = ("bf16", "fp16", "fp32")


class Case(msgspec.Struct, frozen=True):
    """One kernel in one launch configuration."""

    kernel: Any
    dtypes: Mapping[str, str]  # argument -> type; what is not named is an i32
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    label: str = ""


class Row(msgspec.Struct, frozen=True):
    """What the assembler says about one kernel."""

    kernel: str
    label: str
    arch: str
    registers: int
    spilled_bytes: int
    stack_bytes: int
    shared_bytes: int
    shared_limit: int
    tensor_instructions: int

    @property
    def sound(self) -> bool:
        return self.spilled_bytes == 0 and self.shared_bytes <= self.shared_limit


def cases(dtypes: Sequence[str] = DTYPES) -> Iterator[Case]:
    """Every kernel in every configuration that a launcher of `errata.kernels` can choose.

    Args:
        dtypes: Dtypes, as Triton names them.

    Yields:
        Cases.
    """
    yield from codebook_cases(dtypes)
    yield from routing_cases(dtypes)
    yield from product_cases(dtypes)


def codebook_cases(dtypes: Sequence[str]) -> Iterator[Case]:
    """Configurations of the codebook kernels.

    Args:
        dtypes: Dtypes, as Triton names them.

    Yields:
        Cases.
    """
    for dtype, num_rows in itertools.product(dtypes, (1, 64, 4096)):
        rows, width, num_warps, num_stages = codebook.blocks(num_rows, 4 if dtype == "fp32" else 2)
        yield Case(
            codebook.tile_minima,
            {"query": f"*{dtype}", "keys": f"*{dtype}"}
            | dict.fromkeys(("norms", "minima", "longest"), "*fp32"),
            {"WIDEN": dtype == "fp32", "KEYS": codebook.KEYS, "ROWS": rows, "WIDTH": width},
            num_warps,
            num_stages,
            f"{dtype}, {rows} queries",
        )
    for dtype in dtypes:
        yield Case(
            codebook.rescan,
            {"query": f"*{dtype}", "keys": f"*{dtype}", "index": "*i64", "unit": "fp32"}
            | dict.fromkeys(("norms", "max_distance", "minima", "longest", "distance"), "*fp32"),
            {"KEYS": codebook.KEYS, "WIDTH": codebook.SCAN, "TILES": codebook.TILES},
            codebook.SCAN_WARPS,
            label=dtype,
        )


def routing_cases(dtypes: Sequence[str]) -> Iterator[Case]:
    """Configurations of the expert routing kernels.

    Args:
        dtypes: Dtypes, as Triton names them.

    Yields:
        Cases.
    """
    for dtype in dtypes:
        features = ("vision", "query", "vision_keys", "query_keys")
        yield Case(
            lora_moe.score_experts,
            dict.fromkeys(features, f"*{dtype}")
            | {"threshold": "*fp32", "is_active": "*u8", "scores": "*fp32", "scale": "fp32"},
            {"EXPERTS": lora_moe.EXPERTS, "ROWS": lora_moe.ROWS, "WIDTH": lora_moe.WIDTH},
            label=dtype,
        )
        yield Case(
            lora_moe.row_moments,
            {"hidden_states": f"*{dtype}", "moments": "*fp32", "eps": "fp32"},
            {"WIDTH": 8192},
            num_warps=8,
            label=f"{dtype}, 8192 wide",
        )
    yield Case(
        lora_moe.compact_routes,
        {"scores": "*fp32", "weights": "*fp32", "ids": "*i64", "count": "*i64"},
        {"SPAN": lora_moe.SPAN},
    )


def product_cases(dtypes: Sequence[str]) -> Iterator[Case]:
    """Configurations of the grouped LoRA kernels.

    Args:
        dtypes: Dtypes, as Triton names them.

    Yields:
        Cases.
    """
    indices: dict[str, str] = dict.fromkeys(("ids", "count", "lengths"), "*i64")
    for dtype, num_tokens, num_columns in itertools.product(dtypes, (1, 600), (16, 400)):
        widen = dtype == "fp32"
        block = grouped_lora.blocks(num_tokens, num_columns, widen)
        shared = {"RANK": 4, "TOKENS": block.tokens, "WIDEN": widen}
        shape = f"{dtype}, {block.tokens} tokens"
        for normed in (False, True):
            yield Case(
                grouped_lora.shrink,
                indices
                | dict.fromkeys(("x", "down"), f"*{dtype}")
                | dict.fromkeys(("moments", "gamma", "beta", "weights", "inner"), "*fp32"),
                shared
                | {"NORMED": normed, "SHIFTED": normed, "RELU": normed}
                | {"COLUMNS": block.columns, "WIDTH": block.depth},
                block.num_warps,
                label=f"{shape}, {block.columns} columns, {'normed' if normed else 'plain'}",
            )
        yield Case(
            grouped_lora.expand,
            indices | dict.fromkeys(("base", "up", "out"), f"*{dtype}") | {"inner": "*fp32"},
            shared | {"BASED": True, "COLUMNS": block.step, "WIDTH": block.outputs},
            block.num_warps,
            label=f"{shape}, {block.step} columns",
        )


def build(case: Case, arch: int) -> Row:
    """Compile one case for one architecture and read the assembler's report.

    Args:
        case: Kernel and configuration.
        arch: Compute capability, e.g. 90.

    Returns:
        Registers, spills and shared memory.
    """
    names = case.kernel.arg_names
    signature = {
        name: "constexpr" if name in case.constants else case.dtypes.get(name, "i32")
        for name in names
    }
    # As at a launch with torch tensors: pointers and the usual strides are multiples of 16.
    aligned = [
        place
        for place, name in enumerate(names)
        if signature[name].startswith("*") or name.endswith("stride") or name == "width"
    ]
    source = ASTSource(
        case.kernel,
        signature,
        {(names.index(name),): value for name, value in case.constants.items()},
        {(place,): [["tt.divisibility", 16]] for place in aligned},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    report = assemble(compiled.asm["ptx"], arch)
    spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", report)
    registers = re.search(r"Used (\d+) registers", report)
    if spills is None or registers is None:
        raise RuntimeError(f"the assembler's report of {case.kernel.__name__} is odd: {report}")
    return Row(
        kernel=case.kernel.__name__,
        label=case.label,
        arch=f"sm_{arch}",
        registers=int(registers[1]),
        spilled_bytes=int(spills[2]),
        stack_bytes=int(spills[1]),
        shared_bytes=compiled.metadata.shared,
        shared_limit=ARCHITECTURES[arch],
        tensor_instructions=len(re.findall(r"\b(?:mma|wgmma)\.\S*sync", compiled.asm["ptx"])),
    )


def assemble(ptx: str, arch: int) -> str:
    """Run the assembler of the Triton wheel for its verbose report.

    Args:
        ptx: The kernel's PTX.
        arch: Compute capability.

    Returns:
        The report.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        target = re.search(r"\.target (sm_\w+)", ptx)
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={target[1] if target else arch}"]
        ran = subprocess.run(
            [*command, str(source), "-o", str(Path(folder, "kernel.cubin"))],
            capture_output=True,
            text=True,
            check=True,
        )
    return ran.stderr + ran.stdout


def compile_all(dtypes: Sequence[str] = DTYPES) -> list[Row]:
    """Compile every distinct case for every architecture.

    Args:
        dtypes: Dtypes, as Triton names them.

    Returns:
        One row per case and architecture.
    """
    chosen = {(case.kernel.__name__, case.label): case for case in cases(dtypes)}
    return [build(case, arch) for case in chosen.values() for arch in ARCHITECTURES]


def table(rows: list[Row]) -> str:
    """The report as a markdown table.

    Args:
        rows: Rows of `compile_all`.

    Returns:
        Markdown.
    """
    head = (
        "| kernel | configuration | arch | registers | spilled B | shared KiB (limit) | mma |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    return head + "".join(
        f"| {row.kernel} | {row.label} | {row.arch} | {row.registers} | {row.spilled_bytes} "
        f"| {row.shared_bytes / 1024:.1f} ({row.shared_limit // 1024}) "
        f"| {row.tensor_instructions} |\n"
        for row in rows
    )


def main() -> None:
    rows = compile_all(sys.argv[2:] or DTYPES)
    report = Path(sys.argv[1] if len(sys.argv) > 1 else "aot.json")
    report.write_bytes(msgspec.json.format(msgspec.json.encode(rows)) + b"\n")
    versions = f"triton {triton.__version__}, no GPU: machine code only, nothing ran\n\n"
    report.with_suffix(".md").write_text(versions + table(rows))
    if not all(row.sound for row in rows):
        raise SystemExit("a kernel spills or asks for too much shared memory; see " + str(report))


if __name__ == "__main__":
    main()
