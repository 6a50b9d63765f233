"""Runtimes as functions from a batch to the outputs of a file."""

import os
from collections.abc import Callable

import numpy as np

Run = Callable[[np.ndarray], list[np.ndarray]]


def onnxruntime_run(path: str | os.PathLike, threads: int = 0, optimise: bool = True) -> Run:
    """Return a function that runs the file in ONNX Runtime on the CPU.

    Args:
        path: an ONNX file with one input.
        threads: number of threads; 0: ONNX Runtime's default.
        optimise: whether operators are fused, among them those of int8.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Spinning threads would occupy the cores of the next work.
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4  # Failures are raised as well.
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    (image,) = session.get_inputs()
    return lambda batch: session.run(None, {image.name: batch})


def openvino_run(path: str | os.PathLike) -> Run:
    """Return a function that runs an ONNX file in OpenVINO on the CPU, in the file's precision."""
    import openvino

    core = openvino.Core()
    hints = {'INFERENCE_PRECISION_HINT': 'f32'}
    compiled = core.compile_model(core.read_model(str(path)), 'CPU', hints)
    return lambda batch: [np.array(value) for value in compiled(batch).values()]
