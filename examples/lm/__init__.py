"""A small language-model trainer, shared by the example programs.

- `config`: what a run is, in one frozen dataclass.
- `model`: a LLaMA-style decoder in Flax NNX.
- `corpus`: text as bytes, split, and cut into batches by step number.
- `optimizers`: the optimizers under comparison and their schedule.
- `training`: pure step functions and the loop around them.
- `checkpoints`: Orbax, one folder an optimizer.
- `records`: metrics.jsonl and TensorBoard events.
- `analysis`: the summary, computed from the records alone.
- `console`: progress bar and tables.
- `picture`: the figure.
"""
