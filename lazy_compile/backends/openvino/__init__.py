"""Runs exported models with OpenVINO. Imports backends.runner and backends.onnx."""
