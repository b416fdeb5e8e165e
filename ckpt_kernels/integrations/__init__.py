"""One flag in the trainers that people use: each module is for one framework, and is imported only when asked for.

- `transformers`: a callback for Trainer, and for TRL's trainers, which are Trainers; layers that convert
  themselves as they are built.
- `accelerate`: `prepare`, for loops written by hand, diffusers' training scripts among them.
- `lightning`: a callback. `axolotl`: a plugin. `torchtitan`: a model converter.

All take `recompute`, which is a level, a plan, or a budget of memory (see `common`).
"""
