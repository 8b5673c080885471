"""Training: unlabelled images become an encoder bundle (BYOL, Grill et al. 2020)."""
