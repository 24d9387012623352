"""Research tools on the trainer. Each is a folder with a program beside `pretrain.py`.

- `engine`: runs any study, and describes how to make a new one.
- `comparison`: optimizers under the same faults, in many runs (`compare.py`).
- `spike_census`: counts every spike of a run's gradients (`spike_census.py`).
"""
