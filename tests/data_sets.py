"""Small texts and data sets for the tests of the data."""

import itertools
import json
import pathlib

import numpy as np
import pytest

from trainer import data
from trainer.config import RunConfig
from trainer.data import hf_stream, text_files, tokenization
from trainer.errors import UsageError

ROOT = pathlib.Path(__file__).parents[1]


SHAKESPEARE = text_files.SHAKESPEARE.read_text(encoding="utf-8")


ODD = (
    "\x00\x1b \t\r\n\n\n   naïve e\u0301 \ufeff\u200d 漢字かな 👩‍👩‍👧 \U0010ffff"
    " <|endoftext|> x" + " " * 20 + "\u2028end\n"
)


DOCUMENTS = [
    f"{n}: " + SHAKESPEARE[70 * n :][: 13 * n % 90].replace("\n", "|")
    for n in range(40)
]


def config(**settings):
    """Returns a small run on the first part of Shakespeare, changed by `settings`."""
    small = {"data": "text.txt", "batch_size": 8, "sequence_length": 16, "seed": 3}
    if settings.get("data", "text.txt") == "text.txt":
        pathlib.Path("text.txt").write_text(SHAKESPEARE[:20_000], encoding="utf-8")
    return RunConfig.from_settings(**{**small, **settings})


def take(iterable, count):
    return list(itertools.islice(iterable, count))


def refused(**settings):
    """Returns the one line with which a run is refused."""
    with pytest.raises(UsageError) as error:
        data.load(config(**settings))
    assert "\n" not in str(error.value)
    return str(error.value)


def whole_text(source, tokenizer="bytes"):
    """Returns all tokens of text files, training before validation."""
    return np.concatenate(text_files.load(source, tokenizer)[1])


def write(path, text):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")


def write_set(folder, documents=DOCUMENTS, shards=1, held_out="validation"):
    """Writes a local folder like a data set of the hub, and returns its name."""
    for shard in range(shards):
        path = f"{folder}/train-{shard:05}-of-{shards:05}.jsonl"
        write(path, json_lines(documents[shard::shards]))
    held_out_texts = [f"held out {text}" for text in documents]
    write(f"{folder}/{held_out}.jsonl", json_lines(held_out_texts))
    return f"hf:{folder}"


def json_lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def first_epochs(source, host, seed=0):
    """The documents that a host reads in each of the first epochs."""
    windows = hf_stream.windows(source, tokenization.BYTES, 8, seed, host)
    dataset = windows.parents[0].open_documents()
    epochs = [[], [], [], []]
    for text, state in hf_stream.endless(dataset, dataset.state_dict()):
        if state["epoch"] == len(epochs) - 1:
            return epochs[:-1]
        epochs[state["epoch"]].append(text)


def load_tokenizer(name, *texts):
    return tokenization.load(name, lambda: iter(texts), pathlib.Path("kept"))


def decoder(tokenizer):
    """The inverse of a trained tokenizer, from its file."""
    import tokenizers

    (path,) = pathlib.Path(".").rglob(f"bpe-{tokenizer.name[4:]}-*.json")
    decode = tokenizers.Tokenizer.from_file(str(path)).decode
    return lambda ids: decode(ids, skip_special_tokens=False)


def trained_file():
    load_tokenizer("bpe:300", SHAKESPEARE[:5000])
    (path,) = pathlib.Path("kept").iterdir()
    return str(path)
