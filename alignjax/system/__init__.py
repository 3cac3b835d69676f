"""The machine: meshes, checkpoints, optimizers, metrics."""
