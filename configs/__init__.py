"""Hydra configuration, packaged: `pkg://accel.configs`."""
