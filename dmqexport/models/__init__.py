"""Model registry: presets, local diffusers folders and the bundled model."""
