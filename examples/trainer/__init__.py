"""A language-model trainer, shared by the example programs.

What a run is:

- `config`: everything that decides its numbers, in one frozen dataclass that checks
  itself.
- `settings`: fields that check their own values, and give the flags theirs.
- `cli`: the flags.
- `run_folder`: what lies where, how a run begins or continues.

What it computes:

- `model`: a LLaMA-style decoder in Flax NNX, and its presets.
- `optimizers`: the table of optimizers and their schedule.
- `train_step`: the training step, pure functions of a state and a batch.
- `metrics`: norms of every tensor, and what the optimizer saw of the gradient.
- `sharding`: where arrays live on a mesh of devices.
- `compile_only`: the same step, compiled for devices that are not at hand.
- `hardware`: peak and memory of the devices.

What it reads:

- `data`: batches, by host, with a place that can be saved.
- `data.text_files`, `data.hf_stream`: text files, and Hugging Face data sets.
- `data.shards`: reads the latter's files; tries again, and names or leaves out
  broken ones.
- `data.tokenization`: bytes, a BPE of its own, or a pretrained one.

How it runs:

- `loop`: step after step, and what is recorded of them.
- `hosts`: several processes, and requests to stop.
- `checkpoints`: Orbax, one folder an optimizer.

- `errors`, `files`: errors of one line, and files that are written whole or not at
  all.

What it shows:

- `output.sinks`: metrics.jsonl, TensorBoard, Weights & Biases.
- `output.summary`: the summary, computed from the records alone.
- `output.console`: progress bar and tables.
- `output.figure`, `output.report`: the figure, and the page at the end.
"""
