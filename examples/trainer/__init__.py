"""A language-model trainer, shared by the example programs.

What a run is:

- `config`: everything that decides its numbers, in one frozen dataclass.
- `cli`: the flags.
- `run_folder`: what lies where, how a run begins or continues.

What it computes:

- `model`: a LLaMA-style decoder in Flax NNX, and its presets.
- `optimizers`: the table of optimizers and their schedule.
- `training`: the training step, pure functions of a state and a batch.
- `sharding`: where arrays live on a mesh of devices.
- `compile_only`: the same step, compiled for devices that are not at hand.
- `hardware`: peak and memory of the devices.

What it reads:

- `data`: batches, by host, with a place that can be saved.
- `data.corpus`, `data.streaming`: text files, and Hugging Face data sets.
- `data.shards`: reads the latter's files; tries again, and names or leaves out
  broken ones.
- `data.tokenization`: bytes, a BPE of its own, or a pretrained one.

How it runs:

- `loop`: step after step, and what is recorded of them.
- `hosts`: several processes, and requests to stop.
- `checkpoints`: Orbax, one folder an optimizer.

What it shows:

- `output.records`: metrics.jsonl, TensorBoard, Weights & Biases.
- `output.analysis`: the summary, computed from the records alone.
- `output.console`: progress bar and tables.
- `output.picture`, `output.report`: the figure, and the page at the end.
"""
