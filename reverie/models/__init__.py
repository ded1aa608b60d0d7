"""Models: a denoiser with its card, as saved, loaded and sampled.

| file | what it holds |
|---|---|
| `card.py` | `Card`: all that it takes to build a model and to sample from it, as plain data |
| `builders.py` | from a card to the objects that it names |
| `model.py` | `Model`, and the `Samples` that it draws |
| `plan.py` | `SamplingPlan`: a request to a model, settled and checked before anything is computed |
| `sampling.py` | from a plan to samples |
| `load.py` | from a path to a model |
| `formats/` | run folders, diffusers' folders, our own, single files: recognised by content, read, written |
| `checkpoints.py` | the checkpoints of a run: whole, or not there |
| `pictures.py`, `provenance.py` | PNGs that say how they were made, and what makes them again; sheets, animations |
| `inspect.py` | what a path holds |
| `memory.py` | how much memory there is, asked before it is taken |
| `fold.py` | a model of classes as a model of one of them |
"""
