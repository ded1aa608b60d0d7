"""Samplers: state machines that take a batch from noise to data, one family a file."""
