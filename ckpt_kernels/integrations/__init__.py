"""Conversion by one flag in the trainers that people use. Each module is for one framework, and is imported only on
demand.

- `transformers`: a callback for Trainer, and for TRL's trainers, which are Trainers; layers that convert themselves
  when they are built.
- `accelerate`: `prepare`, for hand-written training loops, such as diffusers' training scripts.
- `lightning`: a callback. `axolotl`: a plugin. `torchtitan`: a model converter.

All take `recompute`: a level, a plan, or a memory budget (see `common`).
"""
