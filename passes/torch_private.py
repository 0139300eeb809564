"""Every private or unstable name of torch that the compiler leans on. Checked on torch 2.11, 2.12 and 2.13.

Nothing else in this repository may import ``torch._*`` or ``torch.fx.experimental``.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

TreeSpec = pytree.TreeSpec
# oneDNN's linear layer with a weight in oneDNN's own layout; None in a build of torch without oneDNN.
_ONEDNN = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
LINEAR: Any = torch.ops.mkldnn._linear_pointwise.default if _ONEDNN else None
LINEAR_ADD: Any = torch.ops.mkldnn._linear_pointwise.binary if _ONEDNN else None
ROWS = 1024  # the layout is chosen for about this many rows; other counts work, and are as fast


def tree_flatten(tree: Any) -> tuple[list[Any], TreeSpec]:
    """Leaves and structure of a nest of dicts, lists, tuples and dataclasses registered with torch."""
    return pytree.tree_flatten(tree)


def tree_unflatten(leaves: list[Any], spec: TreeSpec) -> Any:
    return pytree.tree_unflatten(leaves, spec)


def leaf_names(tree: Any) -> list[str]:
    """A readable path for every leaf: ``['input_ids']`` is shown as ``input_ids``, nested paths with dots."""
    paths, _ = pytree.tree_flatten_with_path(tree)
    names = []
    for path, _leaf in paths:
        parts = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path]
        names.append(".".join(parts) or "batch")
    return names


def trace(fn: Callable[..., Any], *args: Any) -> fx.GraphModule:
    """make_fx under fake tensors: one flat ATen graph of everything ``fn`` did, functorch transforms included."""
    return make_fx(fn, tracing_mode="fake", _allow_non_fake_inputs=True)(*args)


@contextlib.contextmanager
def keep_node_meta() -> Iterator[None]:
    """Nodes traced while an ``fx.Interpreter`` runs inherit the line and module of the node being interpreted."""
    from torch.fx import traceback

    with traceback.preserve_node_meta():
        yield


def keep_lines_of(fn: Callable[..., Any]) -> None:
    """Nodes traced from now on keep the frames of this function beside those called ``forward`` (torch 2.13)."""
    register = getattr(fx.proxy, "_register_stack_trace_anchor", None)
    if register is not None:
        register(fn)


def is_fake(x: torch.Tensor) -> bool:
    """Whether a tensor is one of a trace, wrapped by ``torch.func`` or not, which holds no values."""
    from torch._subclasses.fake_tensor import is_fake as fake

    return bool(fake(x))


def schema_is_mutable(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and bool(target._schema.is_mutable)


def own(x: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or a copy of a view: torch.compile asks the next tensor for the base that a view had."""
    return x.clone() if x._is_view() else x


def of_any_size(x: torch.Tensor, *dims: int) -> torch.Tensor:
    """The tensor, whose sizes in these dimensions torch.compile is to leave open where it can."""
    for dim in dims:
        torch._dynamo.maybe_mark_dynamic(x, dim)
    return x


def at_one_place(*tensors: torch.Tensor) -> None:
    """They stay where they are from call to call: a CUDA graph reads them there, not from a copy of its own."""
    for x in tensors:
        torch._dynamo.mark_static_address(x)


def may_alias_or_write(target: Any) -> bool:
    """Whether an operator writes an input, or is composed of others and may return a view of one."""
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")
    aliases = any(a.alias_info is not None for a in target._schema.arguments)
    return bool(
        target._schema.is_mutable or (composite and (aliases or torch.Tag.maybe_aliasing_or_mutating in target.tags))
    )


def is_op(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload)


def as_overload(op: Any) -> Any:
    """One operator from what ``torch.library.custom_op`` returned, a packet with one overload, or an overload; else None."""
    from torch._library.custom_ops import CustomOpDef

    if isinstance(op, CustomOpDef):
        op = op._opoverload
    if isinstance(op, torch._ops.OpOverloadPacket):
        packet: Any = op
        names = packet.overloads()
        op = getattr(op, names[0]) if len(names) == 1 else None
    return op if is_op(op) else None


def has_effect(target: Any) -> bool:
    """Whether an operator prints, raises or turns into a Python number what its tensors hold; shape asserts do not."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    name = target._schema.name
    if name in ("aten::_assert_tensor_metadata", "aten::sym_constrain_range", "aten::sym_constrain_range_for_size"):
        return False
    asserts = name.startswith("aten::_functional_assert")
    return asserts or not target._schema.returns or torch.Tag.data_dependent_output in target.tags


def reads_data(target: Any) -> bool:
    """Whether the size of an operator's result, or a Python number that it gives, depends on what its tensors hold."""
    tags = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
    return isinstance(target, torch._ops.OpOverload) and bool(tags & set(target.tags))


def returns_several(target: Any) -> bool:
    """Whether an operator returns a tuple or a list, which ``operator.getitem`` then takes apart."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    returns = target._schema.returns
    return len(returns) > 1 or (len(returns) == 1 and isinstance(returns[0].type, torch.ListType))


def is_random(node: fx.Node) -> bool:
    """Whether a node draws random numbers; see :func:`draws_numbers`."""
    return draws_numbers(node.target, node.args, node.kwargs)


def draws_numbers(target: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call draws random numbers; fused attention does only with a dropout probability above zero."""
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    names = [a.name for a in target._schema.arguments]
    if "dropout_p" not in names:
        return True
    at = names.index("dropout_p")
    return bool((args[at] if len(args) > at else kwargs.get("dropout_p", 0.0)) != 0.0)


def attention_kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool, scale: float | None
) -> str:
    """The kernel that torch takes for attention over tensors like these: cpu, flash, efficient, cudnn or math.

    Where there is no GPU to ask, fake CUDA tensors get ``efficient``, which takes masks. Heads above 192 have no flash
    backward on every GPU.
    """
    if q.device.type != "cuda":
        return "cpu" if q.device.type == "cpu" else "math"
    if not torch.cuda.is_available():
        return "efficient" if q.dtype in (torch.float32, torch.float16, torch.bfloat16) else "math"
    like = [None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, mask)]
    choose: Any = torch._fused_sdp_choice
    choice = choose(*like, 0.0, causal, scale=scale)
    name = {1: "flash", 2: "efficient", 3: "cudnn"}.get(int(choice), "math")
    return "efficient" if name == "flash" and q.shape[-1] > 192 else name


def arguments(node: fx.Node) -> dict[str, Any]:
    """Every argument of an ATen node by name, in schema order, defaults filled in."""
    return named_arguments(node.target, node.args, node.kwargs)


def named_arguments(target: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Of a call, as :func:`arguments`."""
    given = {a.name: a.default_value for a in target._schema.arguments}
    given.update({a.name: x for a, x in zip(target._schema.arguments, args, strict=False)})
    given.update(kwargs)
    return given


def argument_names(target: Any) -> list[str]:
    """Names of an ATen operator's arguments in schema order, keyword-only ones included."""
    return [a.name for a in target._schema.arguments]


def module_stack(meta: Mapping[str, Any]) -> str:
    """The innermost module of the user's model that a node came from, as a dotted path ('' for the root)."""
    stack = meta.get("nn_module_stack") or {}
    path = ""
    for entry in stack.values():
        path = entry[0] if isinstance(entry, tuple) else str(entry)
    return path


def can_pack() -> bool:
    """Whether products with packed weights exist here and pay: oneDNN, and a CPU with AVX-512."""
    return _ONEDNN and torch.backends.cpu.get_cpu_capability() == "AVX512" and bool(torch.backends.mkldnn.enabled)


def has_bfloat16_products() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware (AVX512_BF16 or AMX); without, packed bfloat16 is slower than float32."""
    return can_pack() and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@functools.cache
def look_for_vector_units() -> None:
    """Inductor asks what this CPU can do by building and loading programs, which takes 8 seconds where its cache is empty.

    Here it does so early, on a thread of its own, beside our passes. Nothing depends on it: what fails here, Inductor finds
    out by itself when it asks again.
    """
    with contextlib.suppress(Exception):
        # Imported here: two threads must not import parts of torch at once.
        from torch._inductor import codecache, cpp_builder, cpu_vec_isa

        def ask() -> None:
            with contextlib.suppress(Exception):
                cpu_vec_isa.pick_vec_isa()

        assert codecache and cpp_builder
        threading.Thread(target=ask, name="look_for_vector_units", daemon=True).start()


def pack_linear_weight(weight: torch.Tensor) -> torch.Tensor:
    """``[C, K]`` float32 or bfloat16 in oneDNN's layout for many rows, an opaque tensor that only :data:`LINEAR` reads."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
    return packed


def gather_into(whole: torch.Tensor, part: torch.Tensor, group: Any) -> None:
    """The processes' parts, one behind the other, under the name that each torch knows without a warning."""
    dist: Any = torch.distributed
    call = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
    call(whole, part, group=group)


def default_group_timeout() -> timedelta:
    """How long the default process group of torch.distributed waits, as its creator said."""
    group: Any = torch.distributed.group.WORLD
    found: timedelta = group._get_backend(group._device_types[0]).options._timeout
    return found
