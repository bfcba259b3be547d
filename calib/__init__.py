"""Calibration stage (torch): trajectories, observers, quantizers, bit allocation. Stage package, not API."""
