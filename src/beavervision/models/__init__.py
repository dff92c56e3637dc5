"""Models: what each is and may be used for (cards), where imported ones are kept (store), and the two runtimes.

ONNX Runtime serves CPUs, PyTorch serves CUDA. PyTorch is imported only by :mod:`.nets` and :mod:`.torch_runtime`, and
these only when a model is imported from a checkpoint or runs on CUDA.
"""
