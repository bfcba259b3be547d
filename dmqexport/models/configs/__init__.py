"""Architectures of the presets, as JSON: what `--weights random` is instantiated from, with no model hub at hand."""
