"""A language-model trainer to fork; `pretrain.py` is its program.

To change one thing, start with the file that holds it:

- a setting: `config` (of a run), `model` (of the model), and its flag in `cli`
- the model: `model`, with the table of its shapes; `config.PUBLISHED` has their
  settings, `sharding.RULES` splits its matrices among devices, and `quantization`
  rounds them
- an optimizer: `optimizers`, one entry of a table
- the step: `train_step`, on one screen; what it records: `metrics`
- the loop around the step: `loop`
- the data: `data`; `data.text_files` for files, `data.hf_stream` for Hugging Face data
  sets, `data.shards` for their broken files, `data.tokenization` for tokenizers
- several devices: `sharding`; several processes, and signals to stop: `hosts`
- files of a run: `run_folder`; its checkpoints: `checkpoints`
- the output: `output.sinks` (metrics.jsonl, TensorBoard, Weights & Biases),
  `output.console`, `output.summary`, `output.figure`, `output.report`
- compilation without the device: `compile_only`, with `hardware` (peak and memory of
  devices) and `hlo` (collectives of a compiled program)

The rest supports these: `settings` (fields that check their values), `errors`, `files`.
"""
