"""``export_ort_training``: a private step as ONNX Runtime Training artifacts, a thin wrapper around the export core.

``training_model.onnx``   batch..., sample_mask[B], noise[D] -> (hidden) gradient buffers += clipped sum + noise scale * noise
``optimizer_model.onnx``  AdamW or SGD on gradient buffers / expected batch size
``eval_model.onnx``       batch... -> what ``eval_output`` returns, or the masked mean loss (private data)
``weights.data``          the large frozen weights, once, for both models
``checkpoint``            the trainables' values

The noise is zero except on the last micro-batch of a logical batch: ONNX Runtime's optimizer models accept no extra
input.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dpbitfit_fx.errors import ExportError
from dpbitfit_fx.export_folder import write_folder
from dpbitfit_fx.onnx_eval import eval_model
from dpbitfit_fx.onnx_export import (
    IR_VERSION,
    OPSET,
    SGD,
    AdamW,
    Core,
    Layout,
    Optimizer,
    export_core,
    flat_parameters,
    graph_input,
    layout_of,
    manifest_of,
    plan_metadata,
    prepare,
    resolve_optimizer,
    save_initial,
    split_flat,
)
from dpbitfit_fx.onnx_weights import constant, save_models

if TYPE_CHECKING:
    import onnx_ir as ir

MICROSOFT: Final = "com.microsoft"


def training_model(core: Core, noise_scale: float) -> ir.Model:
    """The core, its accumulator started at the scaled noise, its output added to ONNX Runtime's gradient buffers. In
    place."""
    import onnx_ir as ir

    model, layout = core.model, core.layout
    graph = model.graph
    accumulator = graph_input(model, "accumulator")
    noise = ir.Value(name="noise", shape=ir.Shape([layout.num_trainable]), type=ir.TensorType(ir.DataType.FLOAT))
    scale = constant(model, "noise_scale", np.array(noise_scale, dtype=np.float32))
    scaled = ir.node("Mul", [noise, scale])
    scaled.outputs[0].name = "scaled_noise"
    graph.inputs.remove(accumulator)
    accumulator.name = "unused_accumulator"
    ir.convenience.replace_all_uses_with(accumulator, scaled.outputs[0])
    graph.insert_before(graph[0], scaled)
    graph.inputs.append(noise)

    (total,) = graph.outputs
    graph.outputs.clear()
    total.name = "noisy_sum"
    nodes, gradients = split_flat(model, total, layout, [f"{p.onnx_name}_grad" for p in layout.parameters], "gradient")
    graph.extend(nodes)
    # ONNX Runtime wants one output for the user. The loss would be private; this says nothing.
    done = ir.node("Identity", [constant(model, "one", np.ones(1, dtype=np.float32))])
    done.outputs[0].name = "done"
    done.outputs[0].shape = ir.Shape([1])
    done.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph.append(done)
    graph.outputs.append(done.outputs[0])
    reset = ir.Value(name="lazy_reset_grad", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.BOOL))
    for p, gradient in zip(layout.parameters, gradients, strict=True):
        name = f"{p.onnx_name}_grad.accumulation"
        buffer = ir.Value(name=f"{name}.buffer", shape=ir.Shape(p.shape), type=ir.TensorType(ir.DataType.FLOAT))
        add = ir.node("InPlaceAccumulatorV2", [buffer, gradient, reset], domain=MICROSOFT)
        add.outputs[0].name = f"{name}.out"
        add.outputs[0].shape = ir.Shape([1])
        add.outputs[0].type = ir.TensorType(ir.DataType.BOOL)
        graph.append(add)
        graph.inputs.append(buffer)
        graph.outputs.append(add.outputs[0])
    graph.inputs.append(reset)
    model.opset_imports[MICROSOFT] = 1
    graph.opset_imports[MICROSOFT] = 1
    return model


def optimizer_model(optimizer: Optimizer, count: int, expected_batch_size: float) -> Any:
    """An onnx.ModelProto that divides every gradient by the expected batch size and takes one optimizer step.

    ONNX Runtime gives the sequences' elements in an order of its own: every element is treated alike.
    """
    import onnx
    from onnx import TensorProto, helper

    def tensors(name: str) -> Any:
        return helper.make_tensor_sequence_value_info(name, TensorProto.FLOAT, None)

    inputs = [
        helper.make_tensor_value_info("learning_rate", TensorProto.FLOAT, [1]),
        helper.make_tensor_value_info("step", TensorProto.INT64, [1]),
        tensors("params"),
        tensors("gradients"),
        tensors("first_order_moments"),
    ]
    nodes, averaged = [], []
    constants = [helper.make_tensor("inverse_batch", TensorProto.FLOAT, [], [1.0 / expected_batch_size])]
    for i in range(count):
        constants.append(helper.make_tensor(f"index_{i}", TensorProto.INT64, [], [i]))
        nodes.append(helper.make_node("SequenceAt", ["gradients", f"index_{i}"], [f"sum_{i}"]))
        nodes.append(helper.make_node("Mul", [f"sum_{i}", "inverse_batch"], [f"mean_{i}"]))
        averaged.append(f"mean_{i}")
    nodes.append(helper.make_node("SequenceConstruct", averaged, ["mean_gradients"]))
    if isinstance(optimizer, AdamW):
        inputs.append(tensors("second_order_moments"))
        nodes.append(
            helper.make_node(
                "AdamWOptimizer",
                ["learning_rate", "step", "params", "mean_gradients", "first_order_moments", "second_order_moments"],
                ["updated_flag"],
                domain=MICROSOFT,
                alpha=float(optimizer.betas[0]),
                beta=float(optimizer.betas[1]),
                epsilon=float(optimizer.eps),
                weight_decay=float(optimizer.weight_decay),
                correct_bias=1,
                adam_mode=0,
            )
        )
    else:
        nodes.append(
            helper.make_node(
                "SGDOptimizerV2", ["learning_rate", "params", "mean_gradients"], ["updated_flag"], domain=MICROSOFT
            )
        )
    output = helper.make_tensor_value_info("updated_flag", TensorProto.BOOL, [1])
    graph = helper.make_graph(nodes, "optimizer", inputs, [output], constants)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opsets, producer_name="dpbitfit_fx")
    model.ir_version = IR_VERSION
    assert isinstance(model, onnx.ModelProto)
    return model


def save_checkpoint(step: Any, layout: Layout, path: Path) -> None:
    """ONNX Runtime's checkpoint file with the trainables' current values."""
    from onnx import numpy_helper

    try:
        from onnxruntime.capi import _pybind_state as binding

        write = binding.save_checkpoint
    except (ImportError, AttributeError) as error:
        raise ExportError(
            "ONNX Runtime Training artifacts need the package onnxruntime-training-cpu 1.19.2 (Python 3.11 or "
            "older): pip install "
            "'dpbitfit_fx[ort]'. It provides the module `onnxruntime`, so uninstall `onnxruntime` first. "
            "export_onnx needs neither."
        ) from error
    flat = flat_parameters(step)
    tensors = [
        numpy_helper.from_array(
            flat[p.offset : p.offset + p.numel].reshape(p.shape), name=p.onnx_name
        ).SerializeToString()
        for p in layout.parameters
    ]
    write(tensors, [], os.fspath(path), False)


def export_ort_training(
    step: Any,
    path: str | os.PathLike[str],
    *,
    optimizer: str | Optimizer = "adamw",
    noise_multiplier: float | None = None,
    expected_batch_size: float | None = None,
    eval_output: Callable[[Any, Any], Any] | None = None,
    sample_rate: float | None = None,
    dataset_size: int | None = None,
    steps: int | None = None,
    target_delta: float | None = None,
    overwrite: bool = False,
    tolerance: float = 1e-5,
) -> Path:
    """Write training_model.onnx, eval_model.onnx, optimizer_model.onnx, checkpoint and manifest.json to the folder
    ``path``.

    Args:
        step: a ``PrivateStep`` with noise, or give ``noise_multiplier`` and ``expected_batch_size`` here.
        optimizer: "adamw", "sgd", ``AdamW(lr, betas, eps, weight_decay)`` or ``SGD(lr)``.
        eval_output: ``(model, batch) -> tensor(s)``, what eval_model.onnx gives (logits, say). Without it,
        eval_model.onnx
            gives the mean loss over unmasked rows: on private records that number is private, and no noise protects it.
        sample_rate, dataset_size, steps, target_delta: the public plan, kept in the manifest for the runner.
        overwrite: replace an earlier export at ``path``.
        tolerance: largest error of a gradient buffer, relative to Σ ‖clipped gradient‖ of its rows.

    Returns:
        The folder. Train from it with ``dpbitfit_fx.ort_runner``, or with ``onnxruntime.training.api`` (then the caller
        draws ``noise`` ~ N(0, I) from a secure source for the last micro-batch of every logical batch, zeros
        otherwise).

    Guarantee: before this returns, the artifacts trained one step in ONNX Runtime, with several micro-batch sizes,
    and their
    gradient buffers and parameters agreed with the PyTorch step.

    Raises:
        ExportError: the step has no noise, an operator has no ONNX form, or ONNX Runtime computes something else.
        ArtifactError: the folder cannot be written.
    """
    from dpbitfit_fx.onnx_check import check_ort_training

    chosen = resolve_optimizer(optimizer)
    step = prepare(step, noise_multiplier, expected_batch_size)
    layout = layout_of(step)

    def build(folder: Path, previous: Path | None) -> dict[str, Any]:
        import onnx

        model = training_model(export_core(step, layout), step.noise_scale)
        with step.biases_applied():
            evaluation, outputs = eval_model(step, layout, eval_output)
        save_models({"training_model.onnx": model, "eval_model.onnx": evaluation}, folder, previous)
        onnx.save(
            optimizer_model(chosen, len(layout.parameters), float(step.expected_batch_size)),
            folder / "optimizer_model.onnx",
        )
        save_checkpoint(step, layout, folder / "checkpoint")
        save_initial(step, layout, folder / "initial.safetensors")
        extra = {
            "eval_outputs": outputs,
            "eval_takes_mask": eval_output is None,
            "eval_outputs_are_private": eval_output is None,
        }
        plan = plan_metadata(sample_rate, dataset_size, steps, target_delta)
        return manifest_of(step, layout, chosen, "ort_training", plan, extra)

    return write_folder(
        path,
        overwrite,
        build,
        lambda folder: check_ort_training(step, folder, tolerance=tolerance, eval_output=eval_output),
    )


__all__ = ["SGD", "AdamW", "export_ort_training"]
