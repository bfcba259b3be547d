"""dmqexport: from a PyTorch diffusion model to a quantized, validated, deployable bundle.

Importing this package loads no framework; the stages import theirs when they run.
"""

__version__ = "0.1.0"
