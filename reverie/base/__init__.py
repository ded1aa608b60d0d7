"""The ground under every room: errors that speak, registries by name, randomness as a function."""
