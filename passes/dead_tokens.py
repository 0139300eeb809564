"""Dead tokens: where all that is read of an activation are some of its T rows, only those are computed, both ways.

    f(x)[:, i]                         ->  f(x[:, i])                  f row-wise (``row_wise``), nothing else reads f(x)
    f'(pad_i(g), y)                    ->  pad_i(f'(g, y[:, i]))       y [B, T, C], g [B, 1, C]; f' linear in pad_i(g)
    sum_t pad_i(g)                     ->  sum_t g                     pad_i: [B, 1, C] -> [B, T, C], zeros around row i
    pad_i(g)' a, the weight gradient   ->  g' a[:, i]
    attention(q, k, v, mask)[:, :, i]  ->  attention(q[:, :, i], k, v, mask[:, :, i])         k and v [B, H, T, d] stay whole

So the last layer of a classifier that reads one token computes its query, projection and feed-forward for B rows instead
of B T. The same numbers up to rounding, except that 0 times a NaN or inf of a row that nobody reads is now 0. Causal
attention is the same for its last row alone; other rows of it are left as they are. Every axis that is narrowed is a
public one of a sample's own, never the batch. The meaning check runs behind this pass and sees its graph.
"""

from __future__ import annotations

import dataclasses

from .joint_graph import JointGraph, copy_graph, finish, rows_at_capture
from .row_plan import RowPlan, rows_read
from .row_wise import PRODUCTS
from .row_writer import NoSize, RowWriter


def drop_dead_tokens(joint: JointGraph) -> JointGraph:
    """The same losses and gradients from fewer rows; what was narrowed, or why not, is added to the report."""
    module, notes = joint.module, []
    batch = rows_at_capture(joint)
    for rows in dict.fromkeys(filter(None, (rows_read(n, batch) for n in joint.module.graph.nodes))):
        plan = RowPlan(module.graph, rows, joint)
        count = sum(n.target in PRODUCTS for n in (*plan.narrow, *plan.sums, *plan.split))
        what = f"dead tokens: {rows.stop - rows.start} of {rows.length} rows"
        if count == 0:
            why = plan.obstacle()
            notes += [f"{what} are read, all are computed: {why}"] if why else []
            continue
        graph, _ = copy_graph(module)
        try:
            RowWriter(graph, joint, RowPlan(graph, rows, joint)).run()
        except NoSize:
            notes.append(f"{what} are read, all are computed: a size of the narrowed graph depends on the length")
            continue
        module = finish(graph)
        notes.append(f"{what} are read; {count} products compute no others")
    return dataclasses.replace(joint, module=module, optimized=(*joint.optimized, *notes))
