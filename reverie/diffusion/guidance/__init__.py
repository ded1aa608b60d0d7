"""Guidance: denoisers made of denoisers, one idea a file."""
