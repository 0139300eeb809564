"""The exported one-sample program, run under vmap with our rules for the operators that functorch would loop over."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from . import ctc_rule, recurrent_rules, routing_rules, sample_rules, user_rules, write_rules
from .attention_rule import attention
from .torch_private import arguments, attention_kernel
from .views import VIEWS

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
RULES = {
    **sample_rules.RULES,
    **recurrent_rules.CELLS,
    **recurrent_rules.RULES,
    **ctc_rule.RULES,
    **routing_rules.RULES,
    **write_rules.RULES,
}


def rule_for(target: Any) -> Any:
    return user_rules.RULES.get(target) or RULES.get(target) or routing_rules.BY_NAME.get(str(target))


class OneSample(fx.Interpreter):
    """Runs the exported one-sample graph under vmap, with attention that knows how to be folded."""

    trainable_masks: set[fx.Node]
    kernels: dict[fx.Node, str]
    dropout = False
    current: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.current = n
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is ATTENTION:
            assert self.current is not None
            names = ["query", "key", "value", "attn_mask", "dropout_p", "is_causal"]
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            return attention(
                given["query"],
                given["key"],
                given["value"],
                given.get("attn_mask"),
                given.get("dropout_p", 0.0),
                given.get("is_causal", False),
                scale=given.get("scale"),
                enable_gqa=given.get("enable_gqa", False),
                mask_is_trainable=self.current in self.trainable_masks,
                kernel=self.kernels.get(self.current, "math"),
            )
        if (
            target in VIEWS
        ):  # the program is functional, and vmap's strides need not allow the view that one sample's do
            return args[0].reshape(args[1])
        return (rule_for(target) or target)(*args, **kwargs)


def masks_that_need_gradients(module: fx.GraphModule, trained: list[fx.Node]) -> set[fx.Node]:
    """Attention nodes whose mask depends on a trainable: flash attention has no gradient for it."""
    depends = set(trained)
    for node in module.graph.nodes:
        if any(i in depends for i in node.all_input_nodes):
            depends.add(node)
    return {n for n in module.graph.nodes if n.target is ATTENTION and arguments(n)["attn_mask"] in depends}


def attention_kernels(module: fx.GraphModule) -> dict[fx.Node, str]:
    """The kernel of each attention node, by the shapes and the device of one sample; keys repeated for grouped heads."""
    result = {}
    for node in module.graph.nodes:
        if node.target is ATTENTION:
            given = arguments(node)
            q, k, v, mask = (given[n] and given[n].meta["val"] for n in ("query", "key", "value", "attn_mask"))
            if given["enable_gqa"] and q.dim() == k.dim() == v.dim() == 4:
                k, v = (x.new_empty(x.shape[0], q.shape[1], *x.shape[2:]) for x in (k, v))
            result[node] = attention_kernel(q, k, v, mask, given["is_causal"], given["scale"])
    return result
