"""Kernels without a GPU: their `launch` in a process where Triton interprets them, and what the ops must all do."""

import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import interpreter_float8
import pytest
import torch
from torch import Tensor

Interpret = Callable[..., Any]


@pytest.fixture(scope="session")
def interpret() -> Iterator[Interpret]:
    """`interpret(launch, *arguments)` calls a module-level function of `fastsd_kernels` on CPU tensors.

    Whether Triton interprets is decided when it is imported, so it happens in a process of its own, which this one's
    compilers do not notice. Tensors travel in shared memory: what the kernel writes is seen here, and all of a storage,
    not only the given view of it.
    """
    context = torch.multiprocessing.get_context("spawn")
    with pytest.MonkeyPatch.context() as environment, ProcessPoolExecutor(1, context) as pool:
        environment.setenv("TRITON_INTERPRET", "1")
        environment.setenv("OMP_NUM_THREADS", "1")
        pool.submit(interpreter_float8.repair).result()  # the process starts with the first call
        environment.undo()
        yield lambda function, *arguments, **options: pool.submit(function, *arguments, **options).result()


@pytest.fixture
def output() -> Iterator[Callable[..., Tensor]]:
    """`output(*shape, dtype=...)`: a tensor full of NaN inside a larger one, of which the test must change nothing."""
    made: list[tuple[Tensor, tuple[slice, ...]]] = []

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        # Whole vectors of 16 bytes lie before and after, so that accesses are as wide as in a larger buffer.
        pads = [0] * (len(shape) - 2) + [1] * (len(shape) > 1) + [16]
        whole = torch.empty([n + 2 * pad for n, pad in zip(shape, pads, strict=True)], dtype=dtype)
        whole.view(torch.uint8).fill_(255)  # NaN in every float
        inner = tuple(slice(pad, pad + n) for n, pad in zip(shape, pads, strict=True))
        made.append((whole, inner))
        return whole[inner]

    yield make
    for whole, inner in made:
        whole[inner].view(torch.uint8).fill_(255)
        assert (whole.view(torch.uint8) == 255).all(), "bytes around an output have changed"


def assert_exact(out: Tensor, exact: Tensor, low: Tensor) -> None:
    """The error against float64 is at most twice that of torch in the same precision, plus a rounding of the result.

    It is the rule of flash-attention's tests: it needs no tolerance, since what is computed sets it.
    """
    assert out.shape == exact.shape == low.shape and out.dtype == low.dtype
    if out.numel():
        error, of_torch = ((x.double() - exact).abs().max().item() for x in (out, low))
        # float32 sums of both are in different orders, the interpreter's one after the other. To bfloat16 it
        # cuts off where a GPU rounds.
        roundings = {torch.float32: 8, torch.bfloat16: 2}.get(out.dtype, 1)
        bound = 2 * of_torch + roundings * torch.finfo(out.dtype).eps / 2 * exact.abs().max().item()
        assert error <= bound and not math.isnan(error), f"error {error:.3g}, torch's {of_torch:.3g}, bound {bound:.3g}"


@pytest.fixture(name="assert_exact")
def _assert_exact() -> Callable[[Tensor, Tensor, Tensor], None]:
    return assert_exact


class Call(NamedTuple):
    """One launch in a traced op: the kernel's name, its grid, its arguments, the names of those that it writes."""

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    written: set[str]


class _Hopper:
    """A GPU for the tracer, which compiles a kernel to the point where it sees what is written."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Call]]:
    """`launches(op, *arguments)`: what the op launches for such tensors on a GPU, traced as `torch.compile` does.

    With `dynamic=True` as it traces dynamic shapes: sizes and strides are symbols.
    """
    triton = pytest.importorskip("triton")
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch._subclasses.functional_tensor import dispatch_functionalize
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    def trace(op: Callable[..., Any], *arguments: Any, dynamic: bool = False) -> list[Call]:
        mode = FakeTensorMode(shape_env=ShapeEnv())

        def fake(x: Tensor) -> Tensor:
            like = torch.empty_strided(x.shape, x.stride(), device="meta")
            like = mode.from_tensor(like, static_shapes=not dynamic)
            with mode:
                return torch.empty_strided(like.shape, like.stride(), dtype=x.dtype, device="cuda")

        def called(*tensors: Tensor) -> Any:
            given = iter(tensors)
            return op(*(next(given) if isinstance(x, Tensor) else x for x in arguments))

        fakes = [fake(x) for x in arguments if isinstance(x, Tensor)]
        graph = make_fx(dispatch_functionalize(called), tracing_mode="symbolic")(*fakes)
        calls = []
        for node in graph.graph.nodes:
            if "triton_kernel_wrapper" in str(node.target):
                kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
                constants = kernel_side_table.get_constant_args(node.kwargs["constant_args_idx"])
                written = set(node.kwargs.get("tensors_to_clone", ()))
                passed = {**constants, **node.kwargs["kwargs"]}
                calls.append(Call(kernel.fn.__name__, node.kwargs["grid"][0], passed, written))
        return calls

    monkeypatch.setattr(triton.runtime.driver, "_active", _Hopper())
    return trace


_close = torch.allclose


def _same_bits_or_close(x: Tensor, y: Tensor, **options: Any) -> bool:
    float8 = x.dtype == torch.float8_e4m3fn
    return torch.equal(x.view(torch.uint8), y.view(torch.uint8)) if float8 else _close(x, y, **options)


@pytest.fixture
def check_op() -> Callable[..., None]:
    """`check_op(op, *arguments)`: registered soundly, and the same eagerly, compiled whole and exported, on the CPU."""

    def check(op: Callable[..., Any], *arguments: Any) -> None:
        with pytest.MonkeyPatch.context() as missing:  # it compares by `allclose`, which torch has not for float8
            missing.setattr(torch, "allclose", _same_bits_or_close)
            torch.library.opcheck(op, arguments)

        class Module(torch.nn.Module):
            def forward(self, *x: Any) -> Any:
                return op(*x)

        def run(function: Callable[..., Any]) -> tuple[Any, list[Any]]:
            copies = [x.clone() if isinstance(x, Tensor) else x for x in arguments]
            return function(*copies), copies

        program = torch.export.export(Module(), tuple(arguments), strict=False)
        targets = [str(node.target) for node in program.graph.nodes]
        assert any(target.startswith(("fastsd.", "auto_functionalized")) for target in targets)
        expected = run(op)
        torch.compiler.reset()  # or the ops of other tests count as recompilations of one function
        for function in (torch.compile(op, fullgraph=True, backend="aot_eager"), program.module()):
            torch.testing.assert_close(run(function), expected, rtol=0, atol=0, equal_nan=True)

    return check


@pytest.fixture
def install(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """`install(*packages)`: a folder with these releases alone, to be put before the installed ones, until the end."""
    target = tmp_path / "packages"

    def install(*packages: str) -> Path:
        options = ("-q", "--no-deps", "--no-compile", "--target", str(target))
        run = subprocess.run(
            [sys.executable, "-m", "pip", "install", *options, *packages], capture_output=True, text=True
        )
        assert run.returncode == 0, f"No index that pip knows gives {' and '.join(packages)}:\n{run.stderr}"
        return target

    yield install
    shutil.rmtree(target, ignore_errors=True)  # gigabytes, of which pytest would keep those of three runs
