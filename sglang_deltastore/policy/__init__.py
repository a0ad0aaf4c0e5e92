"""What was asked for, and what is allowed: settings, tiers, calibration, kernels, and what is refused."""
