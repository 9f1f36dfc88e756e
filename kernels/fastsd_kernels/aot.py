"""Compile every shipped variant of every kernel for every architecture, without a GPU, and check what came out.

    python -m fastsd_kernels.aot [--arch 90] [--op NAME] [--json FILE]

A variant fails if it uses more local memory than it states, more shared memory than the chip has, no tensor cores
where it should, or no 16-byte loads where its layout promises them. Registers, local and shared memory are those of
the machine code (`cuobjdump`, which comes with Triton), as are the instructions.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fastsd_kernels
from fastsd_kernels.launch import ARCHES, INTERPRETED, Variant, triton

SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # bytes that a program can have
SHARED_SM = {80: 164 * 1024, 89: 100 * 1024, 90: 228 * 1024}  # bytes of a multiprocessor, 1 KiB of each program its own
WARPS_SM = {80: 64, 89: 48, 90: 64}
PROGRAMS_SM = {80: 32, 89: 24, 90: 32}

MMA = re.compile(r"\b([HIQ]G?MMA)\b")
WIDE = re.compile(r"\b(LDG\.E[\w.]*\.128|LDGSTS[\w.]*\.128|UTMALDG)\b")


class Report(NamedTuple):
    """What one variant became on one architecture.

    Attributes:
        op: the module.
        variant: its name.
        arch: compute capability times ten.
        warps: of a program as compiled; warp specialisation adds some.
        registers: per thread.
        stack: bytes of local memory per thread.
        shared: bytes of shared memory per program.
        occupancy: share of the multiprocessor's warps that can be resident.
        mma: tensor-core instructions by mnemonic.
        wide: loads of 16 bytes a thread, or by the copy engine.
        failures: what is wrong, empty if nothing.
    """

    op: str
    variant: str
    arch: int
    warps: int
    registers: int
    stack: int
    shared: int
    occupancy: float
    mma: dict[str, int]
    wide: int
    failures: tuple[str, ...]


def variants(op: str | None = None) -> Iterator[tuple[str, Variant]]:
    """All (module, variant) of the package, or of one module.

    Raises:
        ValueError: there is no such module with variants.
    """
    names = [module.name for module in pkgutil.iter_modules(fastsd_kernels.__path__)]
    found = {name: importlib.import_module(f"fastsd_kernels.{name}") for name in names if op in (None, name)}
    with_variants = {name: module.VARIANTS for name, module in found.items() if hasattr(module, "VARIANTS")}
    if not with_variants:
        raise ValueError(f"There are no kernels in {op!r}; modules of fastsd_kernels are {', '.join(names)}.")
    for name, of_module in with_variants.items():
        for variant in of_module:
            yield name, variant


def compile_variant(op: str, variant: Variant, arch: int) -> Report:
    """Compile and inspect; a variant that does not compile is a report with that failure."""
    from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped, unused-ignore]

    try:
        kernel = triton.compile(
            _source(variant),
            target=GPUTarget("cuda", arch, 32),
            options={"num_warps": variant.num_warps, "num_stages": variant.num_stages},
        )
    except Exception as error:  # the compiler raises of everything, and the other variants are to be seen too
        lines = str(error).strip().splitlines() or [""]
        failure = f"does not compile: {type(error).__name__}: {lines[-1]}"
        return Report(op, variant.name, arch, variant.num_warps, 0, 0, 0, 0.0, {}, 0, (failure,))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage, sass = _cuobjdump("-res-usage", cubin.name), _cuobjdump("-sass", cubin.name)
    registers, stack = (int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))  # type: ignore[index]
    # The metadata has the warps that were asked for; specialised ones come on top.
    warps = int(re.search(r"\.(?:req|max)ntid (\d+)", kernel.asm["ptx"])[1]) // 32  # type: ignore[index]
    shared = kernel.metadata.shared
    mma, wide = dict(Counter(MMA.findall(sass))), len(WIDE.findall(sass))
    failures = [
        (stack > variant.max_stack, f"uses {stack} bytes of local memory, more than {variant.max_stack}"),
        (shared > SHARED[arch], f"uses {shared} bytes of shared memory, more than sm_{arch}'s {SHARED[arch]}"),
        (variant.mma and not any(arch < 90 or "G" in name for name in mma), "uses no tensor cores"),
        (variant.wide and not wide, "has no 16-byte loads"),
    ]
    occupancy = _programs(arch, warps, registers, shared) * warps / WARPS_SM[arch]
    wrong = tuple(message for failed, message in failures if failed)
    return Report(op, variant.name, arch, warps, registers, stack, shared, occupancy, mma, wide, wrong)


def _source(variant: Variant) -> Any:
    """What Triton compiles: the kernel, with what a launch would know about its arguments."""
    from triton.compiler import ASTSource  # type: ignore[import-untyped, unused-ignore]
    from triton.experimental.gluon._runtime import (  # type: ignore[import-untyped, unused-ignore]
        GluonASTSource,
        GluonJITFunction,
    )

    names = variant.kernel.arg_names
    if set(names) != {*variant.signature, *variant.constexprs}:
        different = ", ".join(sorted(set(names) ^ {*variant.signature, *variant.constexprs}))
        raise ValueError(f"Variant {variant.name} has missing or unknown arguments: {different}.")
    signature, constexprs, attributes = {}, {}, {}
    for i, name in enumerate(names):
        kind, _, known = variant.signature.get(name, "constexpr").partition(":")
        if name in variant.constexprs:
            constexprs[i,] = variant.constexprs[name]
        elif known == "1":
            kind, constexprs[i,] = "constexpr", 1
        elif known == "16" or kind.startswith("*"):
            attributes[i,] = [["tt.divisibility", 16]]
        signature[name] = kind
    source = GluonASTSource if isinstance(variant.kernel, GluonJITFunction) else ASTSource
    return source(variant.kernel, signature, constexprs, attributes)


def _cuobjdump(*arguments: str) -> str:
    tool = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def _programs(arch: int, warps: int, registers: int, shared: int) -> int:
    """Programs that fit on a multiprocessor at once (registers are given out by 256 a warp)."""
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * warps)
    return min(by_registers, SHARED_SM[arch] // (shared + 1024), WARPS_SM[arch] // warps, PROGRAMS_SM[arch])


def table(reports: Sequence[Report]) -> str:
    """The reports as text, one line each."""
    head = ("op", "variant", "sm", "warps", "regs", "stack", "shared", "occupancy", "mma", "wide", "")
    rows = [
        (
            *(str(value) for value in report[:7]),
            f"{report.occupancy:.0%}",
            " ".join(f"{name} {count}" for name, count in report.mma.items()) or "-",
            str(report.wide),
            "; ".join(report.failures),
        )
        for report in reports
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = (" ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows))
    return "\n".join(line.rstrip() for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a command; 1 if a variant fails, 2 if nothing could be compiled."""
    parser = argparse.ArgumentParser(prog="python -m fastsd_kernels.aot", description="Compile the kernels, no GPU.")
    parser.add_argument("--arch", type=int, choices=ARCHES, action="append", help="only this one; may be repeated")
    parser.add_argument("--op", help="only this module's kernels")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the reports there too")
    options = parser.parse_args(arguments)
    if triton is None or INTERPRETED:
        print("Compiling needs Triton, installed and without TRITON_INTERPRET=1.", file=sys.stderr)
        return 2
    try:
        chosen = list(variants(options.op))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    reports = [
        compile_variant(op, variant, arch)
        for op, variant in chosen
        for arch in variant.arches
        if arch in (options.arch or ARCHES)
    ]
    print(f"Triton {triton.__version__}")
    print(table(reports))
    if options.json:
        options.json.write_text(json.dumps([report._asdict() for report in reports], indent=1) + "\n")
    failed = [report for report in reports if report.failures]
    print(f"{len(reports)} compiled, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
