"""Runs exported models with ONNX Runtime. Imports backends.runner and backends.onnx."""
