"""A language-model trainer, shared by the example programs.

What a run is:

- `config`: everything that decides its numbers, in one frozen dataclass.
- `command_line`: the flags.
- `run_folder`: what lies where, how a run begins or continues.

What it computes:

- `model`: a LLaMA-style decoder in Flax NNX, and its presets.
- `architectures`: decoders with other blocks, GPT-2's and Hawk's.
- `optimizers`: the table of optimizers and their schedule.
- `training`: the training step, pure functions of a state and a batch.
- `sharding`: where arrays live on a mesh of devices.
- `ahead_of_time`: the same step, compiled for devices that are not at hand.
- `hardware`: peak and memory of the devices.

What it reads:

- `data`: batches, by host, with a place that can be saved.
- `corpus`, `streaming`: text files, and Hugging Face data sets.
- `shards`: reads the latter's files; tries again, and names or leaves out broken ones.
- `tokenization`: bytes, a BPE of its own, or a pretrained one.

How it runs:

- `loop`: step after step, and what is recorded of them.
- `hosts`: several processes, and requests to stop.
- `checkpoints`: Orbax, one folder an optimizer.

What it shows:

- `records`: metrics.jsonl, TensorBoard, Weights & Biases.
- `analysis`: the summary, computed from the records alone.
- `console`: progress bar and tables.
- `picture`, `report`: the figure, and the page at the end.

For `compare.py`:

- `experiments`: the questions, and the runs that answer them.
- `single_run`: a whole run as one compiled program.
- `comparison`: statistics, tables and pictures of many runs.

And for `spike_census.py`:

- `census`: every spike of a run's gradients, counted without keeping them.
- `census_analysis`: what they show, and whether they go with loss bumps.
- `census_pictures`, `census_report`: heat maps and tables of that.
"""
