"""Models of few steps by training: each method is an Objective over the same Denoiser, one file each.

| file | what it holds |
|---|---|
| `common.py` | what they share: the consistency function, the distance, a step of the teacher's ODE |
| `easy_consistency.py` | easy consistency tuning, from a diffusion model |
| `consistency.py` | consistency distillation, and improved consistency training |
| `continuous_consistency.py` | the limit of both: sCM |
| `mean_flow.py` | average velocities |
| `reflow.py` | straight paths, from a teacher's pairs |
| `progressive.py` | progressive distillation: half the steps at a time |
| `latent_consistency.py` | consistency distillation of a guided teacher, the guidance an input |
| `exact.py` | the exact consistency function, that of an oracle's own ODE |
"""
