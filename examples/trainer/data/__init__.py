"""The data of a run: training batches that can be saved and resumed, and validation."""

import itertools
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import grain
import numpy as np

from trainer.config import RunConfig
from trainer.data import hf_stream, text_files, tokenization
from trainer.data.hf_stream import Host
from trainer.data.tokenization import BYTES, Tokenizer
from trainer.errors import UsageError

THREADS = 2  # that make batches of text files
READY = 4  # batches made ahead of their use
ONE_HOST = Host()
NEXT = "next_index"  # in the state of a Grain iterator over elements with numbers


class Data(NamedTuple):
    """The data of a run.

    `train` is endless. Its elements are this host's part of a batch, integers of shape
    ``(accumulate, rows, sequence_length + 1)``. The state of its iterator is exact: a
    restored one gives the same elements. For text files that is the number of elements
    taken, which means the same for any number of hosts: the hosts' parts make up the
    same micro-batches. For a streamed data set it depends on the host.
    """

    tokenizer: Tokenizer
    train: grain.IterDataset
    validation: np.ndarray  # (batches, batch_size, sequence_length + 1), on every host
    digest: str  # changes when the text or the tokenizer does
    files: str  # their number and size, for people
    left_out: Mapping[str, str] = MappingProxyType({})  # see shards.Shards

    def batch(self, number: int) -> np.ndarray:
        """Returns an element of `train` by its number, from 1.

        A streamed data set is read from its beginning.
        """
        batches = iter(self.train)
        place = batches.get_state()
        if NEXT in place:  # the whole state for text files
            batches.set_state(place | {NEXT: number - 1})
            return next(batches)
        return next(itertools.islice(batches, number - 1, None))


def random_batch(config: RunConfig, vocabulary: int, number: int, host: Host):
    """Returns this host's part of a batch of random tokens, which `number` decides."""
    rows = config.batch_size // config.accumulate
    shape = config.accumulate, rows, config.sequence_length + 1
    rng = np.random.default_rng([config.seed, number])
    tokens = rng.integers(vocabulary, size=shape)
    mine = rows // host.count
    return tokens[:, host.index * mine :][:, :mine]


def load(config: RunConfig, host: Host = ONE_HOST, *, skip_bad_data: int = 0) -> Data:
    """Loads what `config.data` names.

    - None: the embedded Shakespeare.
    - A text file, a pattern like ``books/*.txt``, or a folder, whose .txt files, also
      those in folders below, are read in alphabetical order. The last tenth of the text
      is for validation.
    - "hf:NAME" or "hf:NAME:CONFIGURATION": a data set of the Hugging Face hub, or a
      local folder like one. Training takes the split "train". Validation takes the
      first documents of "validation", or else of "test". Up to `skip_bad_data` of its
      shards may be broken: what cannot be read of them is left out.
    """
    rows = rows_per_host(config, host)
    if is_streamed(config):
        return load_stream(config, host, rows, skip_bad_data)
    return load_files(config, host, rows)


def is_streamed(config: RunConfig) -> bool:
    """Returns whether the data is a data set of the Hugging Face hub."""
    return config.data is not None and config.data.startswith(hf_stream.PREFIX)


def rows_per_host(config: RunConfig, host: Host) -> int:
    """Returns the number of sequences in a host's part of a micro-batch."""
    rows, left = divmod(config.batch_size, config.accumulate * host.count)
    if left:
        several = f" on each of {host.count} hosts" if host.count > 1 else ""
        raise UsageError(
            f"a batch of {config.batch_size} sequences (--batch-size) cannot be divided"
            f" into {config.accumulate} equal parts (--accumulate){several}"
        )
    return rows


def load_files(config: RunConfig, host: Host, rows: int) -> Data:
    """Loads text files, any batch of which can be made from its number."""
    tokenizer, tokens, digest = text_files.load(
        config.data, config.tokenizer, config.separator
    )
    check_length("train", tokens.train, tokenizer, config)
    windows = text_files.shuffled_windows(
        tokens.train, config.sequence_length, config.seed
    )
    mine = windows[host.index :: host.count]
    batches = text_files.batched(mine, rows, config.accumulate)
    train = batches.to_iter_dataset(grain.ReadOptions(THREADS, READY))
    validation = evaluation_batches(tokens.validation, tokenizer, config)
    return Data(tokenizer, train, validation, digest, text_files.describe(config.data))


def load_stream(config: RunConfig, host: Host, rows: int, skip_bad_data: int) -> Data:
    """Loads a data set that is read from its beginning on."""
    source = hf_stream.open_source(config.data, skip_bad_data)
    tokenizer = tokenization.load(
        config.tokenizer,
        lambda: hf_stream.texts(source.train),
        text_files.user_cache(),
        config.separator,
    )
    length = config.sequence_length
    windows = hf_stream.windows(source, tokenizer, length, config.seed, host)
    batches = text_files.batched(windows, rows, config.accumulate)
    train = hf_stream.Prefetched(batches, READY)
    held_out = hf_stream.first_tokens(
        source.validation, tokenizer, config.eval_sequences * length + 1
    )
    validation = evaluation_batches(held_out, tokenizer, config)
    digest = hf_stream.digest(source, tokenizer)
    left_out = source.shards.left_out
    return Data(tokenizer, train, validation, digest, source.files, left_out)


def evaluation_batches(
    tokens: np.ndarray, tokenizer: Tokenizer, config: RunConfig
) -> np.ndarray:
    check_length("validation", tokens, tokenizer, config)
    return text_files.evaluation_batches(
        tokens, config.sequence_length, config.batch_size, config.eval_sequences
    )


def check_length(
    part: str, tokens: np.ndarray, tokenizer: Tokenizer, config: RunConfig
) -> None:
    """Checks that a part of the text holds a sequence."""
    needed = config.sequence_length + 1
    unit = "byte" if tokenizer == BYTES else "token"
    if len(tokens) < needed:
        raise UsageError(
            f"the text is too short: its {part} part has {len(tokens)} {unit}s, one"
            f" sequence of {config.sequence_length} and its next {unit} take {needed}"
        )
