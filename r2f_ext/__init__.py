"""r2f-ext: how much of its training data does a LoRA adapter give away?

The pipeline, left to right: capture -> pairs -> decoders -> inversion -> audit.
"""

__version__ = "0.1.0"
