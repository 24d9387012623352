"""Research tools on the trainer: each a folder, with a program beside `pretrain.py`.

- `comparison`: optimizers under the same faults, many runs; `compare.py`.
- `spike_census`: every spike of a run's gradients; `spike_census.py`.
"""
