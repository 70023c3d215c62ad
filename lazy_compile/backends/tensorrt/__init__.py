"""TensorRT and TensorRT-RTX: building, checking and running engines.

Imports backends.onnx and backends.runner; the packages of TensorRT are imported when needed.
"""
