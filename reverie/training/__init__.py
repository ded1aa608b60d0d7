"""Training: the configuration, the plan made from the data, the loop, and what keeps a run safe."""
