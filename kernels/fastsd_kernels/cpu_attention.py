"""Attention in bfloat16 on x86 CPUs with AVX512-BF16, in C++ (`cpu_attention.cpp`): for compiled backends.

torch's own attention there multiplies blocks so small that it reaches a fifth of what the instructions give; in a step
of Stable Diffusion 1.5 it takes a third of the time. The kernel is compiled by the system's compiler, once, into a
folder of the caller's; `substitute` puts it into traced graphs, so that models do not know of it.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from fastsd_kernels import native

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
MAX_DIM = 160  # of a head: its row of the output stays in registers

_function: Any = None


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, Lq, H, D], k and v [B, Lk, H, D] -> [B, Lq, H, D]: softmax(q k^T / sqrt(D)) v."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def reason() -> str | None:
    """None if the kernel runs on this machine; else the sentence why not."""
    if not torch.cpu._is_avx512_bf16_supported():
        return "this CPU has no AVX512-BF16: torch's attention is used"
    if native.compiler() is None and _function is None:
        return native.NONE
    return None


def build(folder: Path) -> Path:
    """Compile the kernel into a folder, unless it is there; see `native.build`."""
    return native.build(SOURCE, FLAGS, folder)


def load(path: Path) -> None:
    """Take the kernel from a file that `build` made on such a machine; the first one is kept."""
    global _function
    if _function is None:
        number, pointer = ctypes.c_int64, ctypes.c_void_p
        function = ctypes.CDLL(str(path)).attention
        function.argtypes = [*(pointer,) * 4, *(number,) * 5, *(ctypes.POINTER(number),) * 3, ctypes.c_float]
        function.restype = ctypes.c_int
        _function = function


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel computes these, real or fake, [B, L, H, D]."""
    return all(x.device.type == "cpu" and x.dtype == torch.bfloat16 for x in (q, k, v)) and (
        q.shape[-1] == v.shape[-1] and q.shape[-1] <= MAX_DIM and q.shape[-1] % 2 == 0
    )


def cpu_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Non-causal attention: q [B, Lq, H, D], k and v [B, Lk, H, D] -> [B, Lq, H, D], bfloat16, D even and at most 160.

    k and v may have a batch of 1 for all. Any strides with adjacent elements in the last dimension. An element's bits
    depend on its own batch entry and head alone, whatever the number of threads.

    Raises:
        RuntimeError: the kernel was not loaded, or memory is short.
        ValueError: a shape or dtype is another.
    """
    if not takes(q, k, v):
        raise ValueError(f"q, k and v must be bfloat16 on the CPU with an even head dimension up to {MAX_DIM}.")
    batch, queries, heads, dim = q.shape
    keys = k.shape[1]
    # As torch does; whether a graph's batches are the same may not be known where it is traced.
    k, v = (x.expand(batch, -1, -1, -1) if x.shape[0] == 1 else x for x in (k, v))
    if not k.shape == v.shape == (batch, keys, heads, dim) or keys == 0:
        wanted = [batch, "keys > 0", heads, dim]
        raise ValueError(f"k is {list(k.shape)} and v {list(v.shape)}; both must be {wanted}.")
    if _function is None:
        raise RuntimeError("the attention kernel of the CPU is not loaded: call fastsd_kernels.cpu_attention.load")
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    out = q.new_empty(q.shape)
    strides = [(ctypes.c_int64 * 3)(x.stride(0), x.stride(2), x.stride(1)) for x in (q, k, v)]
    if out.numel() and _function(
        *(x.data_ptr() for x in (q, k, v, out)), batch, heads, queries, keys, dim, *strides, dim**-0.5
    ):
        raise RuntimeError(f"attention over {keys} keys found no memory")
    return out


def _fake(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape)


# `custom_op` would import Dynamo at the first call, a second of a cold start.
_LIBRARY = torch.library.Library("fastsd", "FRAGMENT")
_LIBRARY.define("cpu_attention(Tensor q, Tensor k, Tensor v) -> Tensor")
_LIBRARY.impl("cpu_attention", cpu_attention, "CPU")
torch.library.register_fake("fastsd::cpu_attention", _fake, lib=_LIBRARY)


_TARGETS = (F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)


def substitute(graph_module: GraphModule) -> int:
    """Replace torch's attention by the kernel wherever it computes the same, in a graph of Dynamo or `torch.export`.

    Returns:
        How many were replaced.
    """
    graph, count = graph_module.graph, 0
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _TARGETS and _replaceable(node):
            with graph.inserting_before(node):
                swapped = [_swap(graph_module, x) for x in node.args[:3]]
                made = graph.call_function(torch.ops.fastsd.cpu_attention.default, tuple(swapped))
                made.meta = {**node.meta}
                _set_value(made, _value(node).transpose(1, 2))
                back = _swap(graph_module, made)
            node.replace_all_uses_with(back)
            graph.erase_node(node)
            count += 1
    if count:
        graph.lint()
        graph_module.recompile()
    return count


def _replaceable(node: Node) -> bool:
    """Whether a node is plain attention over what the kernel takes; of its other arguments it may have defaults."""
    q, k, v = (_value(x) for x in node.args[:3]) if len(node.args) >= 3 else (None, None, None)
    others = [*node.args[3:], *(value for name, value in node.kwargs.items() if name != "scale")]
    if q is None or k is None or v is None or any(one not in (None, False, 0.0) for one in others):
        return False
    if node.kwargs.get("scale") is not None:
        return False
    return q.ndim == 4 and q.shape[1] == k.shape[1] and takes(q, k, v)


def _value(node: Any) -> Any:
    """The fake tensor of a node."""
    return node.meta.get("val", node.meta.get("example_value"))


def _set_value(node: Node, value: Any) -> None:
    node.meta["val" if "val" in node.meta else "example_value"] = value


def _swap(graph_module: GraphModule, node: Any) -> Node:
    """The node with its heads and tokens swapped."""
    swapped = graph_module.graph.call_function(torch.ops.aten.transpose.int, (node, 1, 2))
    swapped.meta = {**node.meta}
    _set_value(swapped, _value(node).transpose(1, 2))
    return swapped
