"""Export to ONNX with one If a branch. Imports runtime and the passes."""
