"""The data of the example trainer: sources, tokenizers, sharding by host, resuming."""

import concurrent.futures
import errno
import gzip
import hashlib
import http.server
import itertools
import json
import mmap
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import types

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from trainer import data, files, hosts, loop
from trainer.config import RunConfig
from trainer.data import Host, hf_stream, shards, text_files, tokenization
from trainer.errors import DataError, UsageError

ROOT = pathlib.Path(__file__).parents[2]
SHAKESPEARE = text_files.SHAKESPEARE.read_text(encoding="utf-8")
ODD = (
    "\x00\x1b \t\r\n\n\n   naïve e\u0301 \ufeff\u200d 漢字かな 👩‍👩‍👧 \U0010ffff"
    " <|endoftext|> x" + " " * 20 + "\u2028end\n"
)
DOCUMENTS = [
    f"{n}: " + SHAKESPEARE[70 * n :][: 13 * n % 90].replace("\n", "|")
    for n in range(40)
]


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    """Keeps the tests away from the user's folders and the network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    datasets = pytest.importorskip("datasets")
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody there
    monkeypatch.chdir(tmp_path)


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


# ------------------------------------------------------------------------- sources


def test_default_is_the_embedded_text():
    loaded = data.load(config(data=None))
    assert loaded.tokenizer.name == "bytes"
    assert whole_text(None).tobytes() == text_files.SHAKESPEARE.read_bytes()
    assert not (text_files.SHAKESPEARE.parent / ".tokens").exists()


def test_file_is_its_bytes_in_the_order_of_the_batches_before():
    run = config()
    loaded = data.load(run)
    text = text_files.split(pathlib.Path("text.txt").read_bytes())
    before = text_files.batches(text.train, 16, 8, seed=3)
    for n, element in enumerate(take(loaded.train, 400)):  # more than two epochs
        assert element.shape == (1, 8, 17)
        assert element.dtype == np.uint8
        np.testing.assert_array_equal(element[0], before[n])
    np.testing.assert_array_equal(
        loaded.validation, text_files.evaluation_batches(text.validation, 16, 8, 512)
    )


def test_bytes_of_one_file_need_not_be_text_and_are_not_cached(tmp_path):
    noise = bytes(range(256)) * 4
    pathlib.Path("noise").write_bytes(noise)
    _, tokens, _ = text_files.load("noise", "bytes")
    pathlib.Path("noise").write_bytes(b"")  # a run that goes on does not care
    assert tokens.train.tobytes() + tokens.validation.tobytes() == noise
    assert sorted(path.name for path in tmp_path.iterdir()) == ["noise"]


@pytest.mark.parametrize(
    ("source", "texts"),
    [
        ("books", ["a" * 50, "b\r\n" * 50, "é" * 50]),
        ("books/*.txt", ["a" * 50, "é" * 50]),
        ("books/**/*.*", ["a" * 50, "b\r\n" * 50, "no" * 50, "é" * 50]),
        ("books/[z].txt", ["é" * 50]),
        ("books/odd[1].txt", ["a" * 50]),
    ],
)
def test_several_files_are_joined_in_alphabetical_order(source, texts):
    for name, text in {
        "z.txt": "é",
        "b/b.txt": "b\r\n",
        "b/c.md": "no",
        "odd[1].txt": "a",
        ".hidden": "h",
    }.items():
        write(f"books/{name}", text * 50)
    if source == "books/odd[1].txt":
        order = texts
    else:
        order = sorted(texts, key=lambda text: "bnaé".index(text[0]))
    expected = "\n".join(order).encode()
    assert whole_text(source).tobytes() == expected
    assert whole_text(source).tobytes() == expected  # what was cached is not matched


@pytest.mark.parametrize("length", range(95, 110))
def test_split_falls_between_characters(length):
    """Three bytes each, so the last tenth begins at every position inside one."""
    write("text.txt", "€" * length)
    write("other.txt", "")
    tokenizer, tokens, _ = text_files.load("*.txt", "bpe:300")
    decode = decoder(tokenizer)
    assert decode(tokens.train) + decode(tokens.validation) == "€" * length
    assert abs(len(decode(tokens.validation)) - length / 10) < 1


@pytest.mark.parametrize("piece", [1, 2, 7, 64])
def test_pieces_of_a_file_make_up_its_text(piece, monkeypatch):
    monkeypatch.setattr(text_files, "PIECE", piece)
    text = "é€\U0001f600\r\nx\n\n" + "€" * 50 + "\n" + ODD
    write("odd.txt", text)
    (span,) = text_files.whole([pathlib.Path("odd.txt")])
    assert len(list(text_files.pieces(span))) > len(text) // piece // 8
    assert "".join(text_files.pieces(span)) == text
    inside = span._replace(start=2, stop=5)
    assert "".join(text_files.pieces(inside)) == "€"


def test_split_is_the_same_text_for_every_tokenizer():
    _, as_bytes, _ = text_files.load(config().data, "bytes")
    tokenizer, tokens, _ = text_files.load("text.txt", "bpe:400")
    for part, expected in zip(tokens, as_bytes, strict=True):
        assert decoder(tokenizer)(part).encode() == expected.tobytes()


def test_streamed_set_is_its_documents_in_windows(monkeypatch):
    monkeypatch.setattr(hf_stream, "SHUFFLED", 1)
    loaded = data.load(config(data=write_set("set"), batch_size=3, eval_sequences=30))
    epoch = "".join(f"{text}\n" for text in DOCUMENTS).encode()
    windows = np.concatenate([element[0] for element in take(loaded.train, 150)])
    assert len(windows) * 16 > 3 * len(epoch)
    for n, window in enumerate(windows):
        assert window.tobytes() == (epoch * 9)[16 * n :][:17]
    held_out = "".join(f"held out {text}\n" for text in DOCUMENTS).encode()
    assert loaded.validation.shape == (10, 3, 17)
    for n, window in enumerate(loaded.validation.reshape(-1, 17)):
        assert window.tobytes() == held_out[16 * n :][:17]


def test_streamed_validation_is_the_first_windows():
    source = write_set("set", held_out="test")
    all_of_it = data.load(config(data=source, batch_size=4)).validation
    some = data.load(config(data=source, batch_size=4, eval_sequences=8)).validation
    assert some.shape == (2, 4, 17)
    np.testing.assert_array_equal(some, all_of_it[:2])


def test_streamed_windows_are_shuffled_within_blocks(monkeypatch):
    source = write_set("set")
    monkeypatch.setattr(hf_stream, "SHUFFLED", 1)
    in_order = [e.tobytes() for e in take(data.load(one_row(source)).train, 60)]
    monkeypatch.setattr(hf_stream, "SHUFFLED", 20)
    shuffled = [e.tobytes() for e in take(data.load(one_row(source)).train, 60)]
    orders = []
    for start in (0, 20, 40):
        block, expected = shuffled[start:][:20], in_order[start:][:20]
        assert sorted(block) == sorted(expected)
        orders.append([expected.index(window) for window in block])
    assert len({tuple(order) for order in [range(20), *orders]}) == 4
    other = [e.tobytes() for e in take(data.load(one_row(source, seed=4)).train, 20)]
    assert other != shuffled[:20]


def one_row(source, **settings):
    return config(data=source, batch_size=1, **settings)


def test_shards_come_in_another_order_in_every_epoch():
    source = hf_stream.open_source(write_set("set", shards=8))
    orders = [first_epochs(source, Host(), seed)[:3] for seed in (0, 1)]
    for epochs in orders:
        for epoch in epochs:
            assert sorted(epoch) == sorted(DOCUMENTS)
            for n in range(0, 40, 5):  # documents of a shard stay together
                shard = DOCUMENTS.index(epoch[n]) % 8
                assert epoch[n : n + 5] == DOCUMENTS[shard::8]
    assert len({tuple(epoch) for epochs in orders for epoch in epochs}) == 6


def first_epochs(source, host, seed=0):
    """The documents that a host reads in each of the first epochs."""
    windows = hf_stream.windows(source, tokenization.BYTES, 8, seed, host)
    dataset = windows.parents[0].open_documents()
    epochs = [[], [], [], []]
    for text, state in hf_stream.endless(dataset, dataset.state_dict()):
        if state["epoch"] == len(epochs) - 1:
            return epochs[:-1]
        epochs[state["epoch"]].append(text)


@pytest.mark.parametrize("suffix", ["parquet", "txt", "jsonl.gz"])
def test_other_formats_of_a_streamed_set(suffix):
    import pyarrow.parquet

    pathlib.Path("set").mkdir()
    for split in ("train", "validation"):
        path = pathlib.Path(f"set/{split}.{suffix}")
        if suffix == "parquet":
            table = pyarrow.table({"text": DOCUMENTS})
            pyarrow.parquet.write_table(table, path)
        elif suffix == "txt":
            path.write_text("\n".join(DOCUMENTS), encoding="utf-8")
        else:
            path.write_bytes(gzip.compress(json_lines(DOCUMENTS).encode()))
    source = hf_stream.open_source("hf:set")
    assert list(hf_stream.texts(source.train)) == DOCUMENTS


def test_hidden_files_are_left_out_and_links_followed():
    """This holds for a folder and a pattern. A message lists what was read."""
    write("books/a.txt", "aa")
    write("books/z/c.txt", "cccc")
    write("other/b.txt", "bbb")
    for hidden in ("books/._a.txt", "books/.hidden/h.txt", "other/.b.txt"):
        write(hidden, "hidden")
    for link, target in {
        "books/again": "books",
        "books/more": "other",
        "books/m.txt": "books/a.txt",
        "other/back": "books",
    }.items():
        pathlib.Path(link).symlink_to(pathlib.Path(target).absolute())
    pathlib.Path("linked").symlink_to("books")

    found = [str(path) for path in text_files.find("books")]
    assert found == ["books/a.txt", "books/more/b.txt", "books/z/c.txt"]
    assert whole_text("books").tobytes() == b"aa\nbbb\ncccc"
    assert text_files.describe("books") == "3 files, 9 bytes; hidden files left out: 3"
    assert len(text_files.find("linked")) == 3
    assert text_files.find("books/**/*.txt") == text_files.find("books")
    assert (
        text_files.describe("books/*.txt")
        == "1 file, 2 bytes; hidden files left out: 1"
    )
    assert text_files.find("books/.hidden") == [pathlib.Path("books/.hidden/h.txt")]
    assert text_files.find("books/._a.txt") == [pathlib.Path("books/._a.txt")]
    write("secret/.a.txt", "hidden")
    assert "no .txt file in the folder secret; hidden files left out: 1" in refused(
        data="secret"
    )


def test_files_of_a_streamed_set_are_listed():
    source = write_set("set", shards=2)
    told = data.load(one_row(source)).files
    size = sum(path.stat().st_size for path in pathlib.Path("set").iterdir())
    assert told == f"files in train: 2, files in validation: 1, {size:,} bytes"
    write("set/._train.jsonl", "x")
    write("other/train-7.jsonl", json_lines(["linked"]))
    pathlib.Path("set/more").symlink_to(pathlib.Path("other").absolute())
    told = data.load(one_row(source)).files
    assert "; files left out (hidden, linked folders, no split): 2" in told


# -------------------------------------------------------------------- broken shards


def gzipped(text):
    return gzip.compress(text.encode())


def parquet(texts):
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), sink)
    return sink.getvalue().to_pybytes()


LINES = json_lines(DOCUMENTS)
BROKEN = {  # format: what is wrong: the bytes of a shard
    "jsonl": {
        "cut short": LINES[:-9].encode() + b"\n" + LINES.encode(),
        "not UTF-8": LINES.encode().replace(b"0: ", b"\xff: "),
        "another column": LINES.replace('"text"', '"body"').encode(),
        "no text at all": b'{"text": null}\n' * 9,
        "numbers among texts": LINES.encode() + b'{"text": 5}\n',
    },
    "jsonl.gz": {
        "cut short": gzipped(LINES)[:-300],
        "not gzip": LINES.encode(),
    },
    "txt": {"not UTF-8": "é".encode("latin-1") * 99},
    "parquet": {
        "cut short": parquet(DOCUMENTS)[:-300],
        "overwritten": parquet(DOCUMENTS)[:90]
        + b"\xff" * 90
        + parquet(DOCUMENTS)[180:],
        "numbers": parquet([{"a": 5}]),
        "vanished": None,
    },
}


def windows_of(source, count, state=None):
    """Returns windows of a set, from the first or from `state` on, and the state."""
    iterator = iter(hf_stream.windows(source, tokenization.BYTES, 16, 0, Host()))
    if state is not None:
        iterator.set_state(state)
    return [bytes(window) for window in take(iterator, count)], iterator.get_state()


def test_broken_shards_are_named_or_left_out(monkeypatch, capsys):
    monkeypatch.setattr(hf_stream, "SHUFFLED", 1)
    good = {
        "jsonl": LINES.encode(),
        "jsonl.gz": gzipped(LINES),
        "txt": "\n".join(DOCUMENTS).encode(),
        "parquet": parquet(DOCUMENTS),
    }
    for kind, damages in BROKEN.items():
        for damage, content in damages.items():
            capsys.readouterr()
            folder = pathlib.Path(f"{damage} {kind}")
            folder.mkdir()
            for name in ("train-0", "train-1", "validation"):
                (folder / f"{name}.{kind}").write_bytes(good[kind])
            broken = folder / f"train-1.{kind}"
            if content is not None:
                broken.write_bytes(content)
            opened = [hf_stream.open_source(f"hf:{folder}", n) for n in (0, 1, 1)]
            if content is None:
                broken.unlink()

            with pytest.raises(DataError) as error:
                windows_of(opened[0], 200)
            line = str(error.value)
            assert f"{broken}, of which 0 rows were read: " in line, line
            assert "--skip-bad-data 1 " in line and "\n" not in line
            assert not opened[0].shards.left_out
            assert capsys.readouterr().err == ""

            expected, _ = windows_of(opened[1], 200)  # more than an epoch
            told = capsys.readouterr().err
            assert told.count("\n") == 1 and f"the rest of {broken.resolve()}" in told
            assert list(opened[1].shards.left_out) == [str(broken.resolve())]
            known = set("\n".join(["", *DOCUMENTS, ""]).encode())
            assert set(b"".join(expected)) <= known
            start, state = windows_of(opened[2], 60)
            rest, _ = windows_of(hf_stream.open_source(f"hf:{folder}", 1), 140, state)
            assert start + rest == expected


def test_first_file_may_be_broken_or_of_another_type(capsys):
    """The library takes the columns from the first file."""
    good_ones = {"jsonl.gz": gzipped(LINES), "parquet": parquet(DOCUMENTS)}
    cases = [
        (kind, content)
        for kind, damages in BROKEN.items()
        for damage, content in damages.items()
        if damage not in ("another column", "vanished")
    ]
    for number, (kind, content) in enumerate(cases):
        good = good_ones.get(kind, LINES.encode())
        folder = pathlib.Path(f"set{number}")
        folder.mkdir()
        for name, shard in (("train-0", content), ("train-1", good)):
            (folder / f"{name}.{kind}").write_bytes(shard)
        (folder / f"validation.{kind}").write_bytes(good)
        line = refused(data=f"hf:{folder}")
        assert f"{folder}/train-0.{kind}, of which 0 rows were read: " in line, line
        assert "--skip-bad-data 1 " in line
        source = hf_stream.open_source(f"hf:{folder}", 1)
        assert len(list(hf_stream.texts(source.train))) == len(DOCUMENTS)
        (name,) = source.shards.left_out
        assert name.endswith(f"{folder}/train-0.{kind}")
    assert capsys.readouterr().err.count("leaving out") == len(cases)


def test_numbers_in_a_later_file_are_no_text():
    source = write_set("set")
    write("set/train-1.jsonl", json_lines([1, 2]))
    told = "train-1.jsonl, of which 0 rows were read: .*int64, not text"
    with pytest.raises(DataError, match=told):
        list(hf_stream.texts(hf_stream.open_source(source).train))


def test_files_without_rows_are_passed_over():
    for number in (0, 1):
        folder = pathlib.Path(f"set{number}")
        folder.mkdir()
        for name, texts in ((number, []), (1 - number, ["a", "b"])):
            (folder / f"train-{name}.parquet").write_bytes(parquet(texts))
        (folder / "test.parquet").write_bytes(parquet(["c"]))
        source = hf_stream.open_source(f"hf:{folder}")
        assert list(hf_stream.texts(source.train)) == ["a", "b"]


def test_the_current_folder_can_be_a_set():
    write_set("set")
    os.chdir("set")
    assert list(hf_stream.texts(hf_stream.open_source("hf:.").train)) == DOCUMENTS
    assert "must name a data set" in refused(data="hf:")


def test_what_was_left_out_is_in_the_state(monkeypatch):
    monkeypatch.setattr(hf_stream, "SHUFFLED", 1)
    source = write_set("set", shards=3)
    write("set/train-00001-of-00003.jsonl", "{")
    first = hf_stream.open_source(source, 1)
    _, state = windows_of(first, 400)
    state = json.loads(json.dumps(state))
    write("set/train-00002-of-00003.jsonl", "{")
    with pytest.raises(DataError, match="-00002-.*--skip-bad-data 2 "):
        windows_of(hf_stream.open_source(source, 1), 400, state)
    second = hf_stream.open_source(source, 2)
    windows_of(second, 400, state)
    assert len(second.shards.left_out) == 2


def test_broken_validation_set_is_named():
    source = write_set("set", held_out="test")
    write("set/test.jsonl", LINES[:40] + "\n" + LINES)
    assert "set/test.jsonl, of which 0 rows were read: " in refused(data=source)
    write("set/test-1.jsonl", LINES)
    loaded = data.load(config(data=source, eval_sequences=512), skip_bad_data=1)
    assert len(loaded.left_out) == 1


class Connection:
    """A reader of one shard that fails before some of its parts, so many times."""

    def __init__(self, failures):
        self.failures = failures  # by part

    def __call__(self, files):
        for number in range(6):
            if self.failures.get(number):
                self.failures[number] -= 1
                raise self.error
            yield number, {"text": f"{number}"}


def test_lost_connections_are_tried_again(monkeypatch, capsys):
    import huggingface_hub.errors
    from huggingface_hub.utils import httpx

    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    response = httpx.Response(503, request=httpx.Request("GET", "http://x"))
    passing = [
        ConnectionError("Server Disconnected"),
        TimeoutError(),
        OSError(errno.EIO, "Input/output error"),
        httpx.ConnectError("no route"),
        type("ClientError", (Exception,), {"__module__": "aiohttp.client"})("cut off"),
        huggingface_hub.errors.HfHubHTTPError("busy", response=response),
    ]
    lasting = [FileNotFoundError(2, "gone"), ValueError("x"), EOFError(), OSError("x")]
    for error in (*passing, *lasting):
        assert shards.may_pass(error) == (error in passing), error
    for error in passing:
        for failures, delays in (({0: 1, 3: 2}, [1, 1, 2]), ({5: 6}, [1, 2, 4, 8, 16])):
            waited.clear()
            reader = Connection(dict(failures))
            reader.error = error
            builder = types.SimpleNamespace(_generate_examples=reader)
            guard = shards.Shards()
            guard.guard(builder)
            guard.opened = True
            read = builder._generate_examples(files=["hf://a/b.jsonl"])
            if 5 in failures:
                with pytest.raises(
                    DataError, match="b.jsonl, of which 5 rows were read: "
                ):
                    list(read)
            else:
                assert [number for number, _ in read] == list(range(6))
            assert waited == delays
            lines = capsys.readouterr().err.splitlines()
            assert len(lines) == len(delays)
            assert (
                "hf://a/b.jsonl, of which" in lines[-1]
                and type(error).__name__ in lines[-1]
            )
            assert f"trying again in {delays[-1]} s" in lines[-1]


def test_hosts_end_at_the_same_batch(monkeypatch):
    """One host has no part of the third batch, and the other has more."""

    class Batches:
        def __init__(self, count):
            self.left = iter(range(count))
            self.taken = None

        def __next__(self):
            self.taken = next(self.left, None)
            if self.taken is None:
                raise DataError("file.jsonl, after row 7")
            return self.taken

        def get_state(self):
            return {"at": self.taken}

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for mine, others in ((2, 99), (99, 2), (2, 2), (99, 0)):
        other = [others % 97, "file.jsonl, after row 7"]
        if others == 99:
            other = [loop.BATCHES_AT_ONCE, ""]
        monkeypatch.setattr(hosts, "gather", lambda mine: [mine, other])  # noqa: B023
        taken = []
        with pytest.raises(DataError, match="file.jsonl, after row 7"):
            taken.extend(loop.fetched(Batches(mine)))
        taken = []
        fetching = loop.fetched(Batches(mine))
        with pytest.raises(DataError):
            for pair in fetching:
                taken.append(pair)
        assert taken == [(n, {"at": n}) for n in range(min(mine, others))]


# ---------------------------------------------------------------------- tokenizers


def load_tokenizer(name, *texts):
    return tokenization.load(name, lambda: iter(texts), pathlib.Path("kept"))


def decoder(tokenizer):
    """The inverse of a trained tokenizer, from its file."""
    import tokenizers

    (path,) = pathlib.Path(".").rglob(f"bpe-{tokenizer.name[4:]}-*.json")
    decode = tokenizers.Tokenizer.from_file(str(path)).decode
    return lambda ids: decode(ids, skip_special_tokens=False)


def test_bytes():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer[:3] == ("bytes", 256, None)
    tokens = tokenizer.encode(ODD)
    assert tokens.dtype == np.uint8
    assert tokens.tobytes() == ODD.encode()
    assert tokenizer.separator.tobytes() == b"\n"


def test_bpe_round_trip_is_exact():
    tokenizer = load_tokenizer("bpe:600", SHAKESPEARE[:50_000])
    assert tokenizer.name == "bpe:600"
    assert tokenizer.vocabulary == 600
    for text in (ODD, SHAKESPEARE[50_000:60_000], "", " ", "\r\n", "é" * 99):
        tokens = tokenizer.encode(text)
        assert tokens.dtype == np.uint16
        assert decoder(tokenizer)(tokens) == text
    tokens = tokenizer.encode(SHAKESPEARE[50_000:60_000])
    assert len(tokens) < 10_000 / 2  # it did learn
    assert tokenizer.end not in tokens
    assert tokenizer.separator.tolist() == [tokenizer.end]
    assert decoder(tokenizer)([tokenizer.end]) == "<|endoftext|>"


def test_bpe_is_trained_once_for_each_text_and_size(monkeypatch):
    trained = []
    train = tokenization.train
    monkeypatch.setattr(
        tokenization, "train", lambda *args: trained.append(args[0]) or train(*args)
    )
    text = SHAKESPEARE[:5000]
    first = load_tokenizer("bpe:300", text)
    again = load_tokenizer("bpe:300", text)
    assert trained == [300]
    assert first.digest == again.digest
    np.testing.assert_array_equal(first.encode(ODD), again.encode(ODD))
    others = [
        load_tokenizer("bpe:301", text),
        load_tokenizer("bpe:300", text + "."),
        load_tokenizer("bpe:300", text[:2500], text[2500:]),
    ]
    assert trained == [300, 301, 300, 300]
    assert first.digest not in {tokenizer.digest for tokenizer in others[:1]}


def test_bpe_is_the_same_in_every_process():
    program = (
        "import pathlib, sys; sys.path.insert(0, sys.argv[1]);"
        "from trainer.data import tokenization;"
        "text = pathlib.Path(sys.argv[2]).read_text(encoding='utf-8')[:100_000];"
        "folder = pathlib.Path('other');"
        "print(tokenization.load('bpe:1000', lambda: [text], folder).digest)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program, ROOT / "examples", text_files.SHAKESPEARE],
        capture_output=True,
        text=True,
        check=True,
    )
    here = load_tokenizer("bpe:1000", SHAKESPEARE[:100_000])
    assert finished.stdout == here.digest + "\n"
    (theirs,) = pathlib.Path("other").iterdir()
    (ours,) = pathlib.Path("kept").iterdir()
    assert theirs.name == ours.name  # so that one of them is enough
    assert theirs.read_bytes() == ours.read_bytes()


def test_bpe_sees_only_the_beginning_of_a_long_text(monkeypatch):
    monkeypatch.setattr(tokenization, "TRAINING_CHARACTERS", 3000)
    read = []

    def texts():
        for start in range(0, 20_000, 1000):
            read.append(start)
            yield SHAKESPEARE[start : start + 1000]

    long = tokenization.load("bpe:300", texts, pathlib.Path("kept"))
    assert max(read) == 2000
    pieces = [SHAKESPEARE[start : start + 1000] for start in (0, 1000, 2000)]
    assert long.digest == load_tokenizer("bpe:300", *pieces).digest


def test_several_may_train_at_once():
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        futures = [
            pool.submit(load_tokenizer, "bpe:300", SHAKESPEARE[:20_000])
            for _ in range(4)
        ]
        digests = {future.result().digest for future in futures}
    assert len(digests) == 1
    assert len(list(pathlib.Path("kept").iterdir())) == 1


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(OSError, match="full"), files.replacing(path) as new:
        new.write_text("half")
        raise OSError("disk full")
    assert path.read_text() == "before"
    with files.replacing(path) as new:
        new.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


def test_tokenizer_file_is_used_without_its_additions():
    """Additions may shorten texts and begin them with special tokens."""
    trained = load_tokenizer("bpe:300", SHAKESPEARE[:5000])
    (path,) = pathlib.Path("kept").iterdir()
    content = json.loads(path.read_text(encoding="utf-8"))
    content["truncation"] = {
        "direction": "Right",
        "max_length": 5,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    end = {"SpecialToken": {"id": tokenization.END, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    ids = {"id": tokenization.END, "ids": [0], "tokens": [tokenization.END]}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [end, text],
        "pair": [end, text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {tokenization.END: ids},
    }
    for end in ("</s>", "[CLS]"):
        write("my.json", json.dumps(content).replace(tokenization.END, end))
        tokenizer = load_tokenizer("my.json")
        assert tokenizer.name == "my.json"
        assert tokenizer.vocabulary == 300
        assert tokenizer.end == (0 if end == "</s>" else None)
        tokens = tokenizer.encode(SHAKESPEARE[:100])
        assert tokens.tolist() == trained.encode(SHAKESPEARE[:100]).tolist()
        assert tokenizer.digest != trained.digest
    np.testing.assert_array_equal(tokenizer.separator, trained.encode("\n"))


def test_ids_fit_their_dtype():
    import tokenizers

    for size, dtype in ((256, np.uint8), (257, np.uint16), (65_537, np.uint32)):
        words = {f"w{n}": n for n in range(size - 1)}
        model = tokenizers.models.WordLevel({**words, "last": size - 1}, "last")
        tokenizers.Tokenizer(model).save("ids.json")
        tokenizer = load_tokenizer("ids.json")
        assert tokenizer.vocabulary == size
        assert tokenizer.encode("last").tolist() == [size - 1]
        assert tokenizer.encode("last").dtype == dtype


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bpe:", ["bpe: ", "bpe:8192"]),
        ("bpe:256", ["bpe:256", "257"]),
        ("bpe:many", ["bpe:many", "bpe:SIZE"]),
        ("bpe:-5", ["bpe:-5"]),
        ("bpe:99999999999", ["bpe:99999999999", "at most 1048576"]),
        ("nowhere.json", ["nowhere.json", "No such file"]),
        ("broken.json", ["broken.json"]),
        ("no such/name", ["no such/name", "bytes", "bpe:SIZE"]),
    ],
)
def test_tokenizers_that_are_refused(name, words):
    write("broken.json", "{")
    line = refused(tokenizer=name)
    for word in words:
        assert word in line


def test_without_the_packages_bytes_of_files_remain(monkeypatch):
    source = write_set("set")
    for package in ("tokenizers", "datasets"):
        monkeypatch.setitem(sys.modules, package, None)
    assert next(iter(data.load(config()).train)).shape == (1, 8, 17)
    for tokenizer in ("bpe:300", "my.json", "some/name"):
        write("my.json", "{}")
        assert "pip install tokenizers" in refused(tokenizer=tokenizer)
    assert "pip install datasets" in refused(data=source)


def save_tokenizer(path, model, **parts):
    import tokenizers

    tokenizer = tokenizers.Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    write(path, tokenizer.to_str())
    return str(path)


def unigram(*controls):
    """A tokenizer whose model has its control tokens among its pieces, as T5's."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram())
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=80,
        special_tokens=["<pad>", *controls, "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    text = [SHAKESPEARE[:3000], "< / s > e o"]
    tokenizer.train_from_iterator(text, trainer)
    write("unigram.json", tokenizer.to_str())
    return "unigram.json"


def words_of(*words):
    import tokenizers

    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]")
    split = tokenizers.pre_tokenizers.WhitespaceSplit()
    return save_tokenizer("words.json", model, pre_tokenizer=split)


def test_control_tokens_in_a_text_are_text():
    import tokenizers

    spelt = "They write {0} or <pad> or {0} again. " * 9
    plain = trained_file()
    content = json.loads(pathlib.Path(plain).read_text(encoding="utf-8"))
    content["added_tokens"][0]["special"] = False
    write("ordinary.json", json.dumps(content))
    for name, end in {
        "bpe:300": "<|endoftext|>",
        plain: "<|endoftext|>",
        "ordinary.json": "<|endoftext|>",
        unigram("</s>"): "</s>",
        words_of("[UNK]", "[SEP]", "They", "or"): "[SEP]",
    }.items():
        text = spelt.format(end)
        tokenizer = load_tokenizer(name, SHAKESPEARE[:5000])
        separator = tokenizer.separator.tolist()
        assert len(separator) == 1 and separator[0] == tokenizer.end
        assert tokenizer.end not in tokenizer.encode(text)
        assert len(tokenizer.encode(text)) > 9
        write("one.txt", text * 9)
        assert tokenizer.end not in whole_text("one.txt", name)
        documents = list(hf_stream.joined(tokenizer, [text, text]))
        assert [list(tokens).count(tokenizer.end) for tokens in documents] == [1, 1]
        if name != "bpe:300":  # tokens kept by an older version are not taken
            package = tokenizers.Tokenizer.from_file(name)
            old = hashlib.sha256(package.to_str().encode()).hexdigest()
            assert tokenizer.digest != old


def test_tokenizers_of_earlier_versions_give_the_same_tokens():
    import tokenizers

    byte_level = tokenizers.pre_tokenizers.ByteLevel
    package = tokenizers.Tokenizer(tokenizers.models.BPE())
    package.pre_tokenizer = byte_level(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    package.train_from_iterator([SHAKESPEARE[:20_000]], trainer)
    write("old.json", package.to_str())
    for text in (SHAKESPEARE[20_000:30_000], "A" * 1000, ODD.replace("<|", "")):
        expected = package.encode(text).ids
        assert load_tokenizer("old.json").encode(text).tolist() == expected


def test_end_of_a_document_is_found():
    import tokenizers

    template = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [END]", special_tokens=[("[CLS]", 1), ("[END]", 2)]
    )
    bert = tokenizers.processors.BertProcessing(("[END]", 2), ("[CLS]", 1))
    both = tokenizers.processors.Sequence([template])
    model = tokenizers.models.WordLevel(
        {"[UNK]": 0, "[CLS]": 1, "[END]": 2, "<eot>": 3, "a": 4}, "[UNK]"
    )
    for processor in (template, bert, both):
        path = save_tokenizer("declared.json", model, post_processor=processor)
        assert load_tokenizer(path).end == 2
    for token in ("<eot>", {"content": "<eot>", "special": True}):
        write("tokenizer_config.json", json.dumps({"eos_token": token}))
        assert load_tokenizer("declared.json").end == 3
    for content in ("{", "[]", "{}", json.dumps({"eos_token": None})):
        write("tokenizer_config.json", content)
        assert load_tokenizer("declared.json").end == 2
    for end in (*tokenization.END_TOKENS, *tokenization.OTHER_END_TOKENS):
        path = words_of("[UNK]", "a", end)
        assert load_tokenizer(path).end == 2
        write("one.txt", "a " * 50)
        assert whole_text("one.txt", path).tolist() == [1] * 50
        write("two.txt", "a " * 50)
        assert sorted(whole_text("[ot]*.txt", path))[-1] == 2


def test_tokenizers_that_cannot_be_used():
    tokenizers = pytest.importorskip("tokenizers")
    for vocabulary, words in (
        ({}, "has no tokens"),
        ({"a": 0}, r"words.json cannot encode the text: .*Missing \[UNK\]"),
    ):
        model = tokenizers.models.WordLevel(vocabulary)
        tokenizers.Tokenizer(model).save("words.json")
        with pytest.raises(UsageError, match=words):
            data.load(config(tokenizer="words.json"))
    assert "cannot load the tokenizer" in refused(tokenizer="x" * 300)


def test_folder_of_a_tokenizer_whose_declared_end_is_odd():
    pathlib.Path("mine").mkdir()
    trained = load_tokenizer("bpe:300", SHAKESPEARE[:5000])
    (path,) = pathlib.Path("kept").iterdir()
    content = path.read_text(encoding="utf-8").replace(tokenization.END, "<e>")
    write("mine/tokenizer.json", content)
    for end in (3, ["<e>"], {"content": {}}, {"content": "<e>"}):
        write("mine/tokenizer_config.json", json.dumps({"eos_token": end}))
        tokenizer = load_tokenizer("mine")
        assert tokenizer.end == (0 if end == {"content": "<e>"} else None)
    assert tokenizer.encode("a b").tolist() == trained.encode("a b").tolist()


def test_separator_is_named_or_needed():
    path = words_of("[UNK]", "a", "b")
    write("books/one.txt", "a " * 300)
    settings = {"data": "books", "tokenizer": path}
    data.load(config(**settings))  # one file needs none
    write("books/two.txt", "b " * 300)
    needed = refused(**settings)
    assert path in needed and "--separator" in needed and "line ends" in needed
    assert "--separator" in refused(data=write_set("set"), tokenizer=path)
    loaded = data.load(config(**settings, separator="[UNK]"))
    assert loaded.tokenizer.separator.tolist() == [0]
    tokens = text_files.load("books", path, "[UNK]")[1].train
    assert tokens[299:302].tolist() == [1, 0, 2]
    assert text_files.load("books", path, "a")[2] != loaded.digest
    line = refused(**settings, separator="c")
    assert "--separator 'c' " in line and path in line
    assert "bytes" in refused(data="books", separator="x")


def test_long_words_are_cut():
    """Training and encoding take time in proportion to a text without spaces."""
    import tokenizers

    letters = np.random.default_rng(0).choice([*"ACGT", "", "ก", "漢"], 200_000)
    text = "".join(letters)
    tokenizer = load_tokenizer("bpe:300", text[:180_000])  # 10 s if it were one word
    (path,) = pathlib.Path("kept").iterdir()
    split = tokenizers.Tokenizer.from_file(str(path)).pre_tokenizer
    assert max(len(word) for word, _ in split.pre_tokenize_str(text)) == 256
    tokens = tokenizer.encode(text)
    assert decoder(tokenizer)(tokens) == text
    assert len(tokens) < 0.8 * len(text.encode())


# ---------------------------------------------------------------------------- hub


class Hub(http.server.BaseHTTPRequestHandler):
    """Has one tokenizer, somebody/something."""

    def do_HEAD(self):
        content = pathlib.Path("hub.json").read_bytes()
        known = self.path in ("/", "/somebody/something/resolve/main/tokenizer.json")
        self.send_response(200 if known else 404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("ETag", '"e"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        return content if known else b""

    def do_GET(self):
        self.wfile.write(self.do_HEAD())

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine, which may be shut down."""
    import huggingface_hub.constants

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    address = f"http://127.0.0.1:{server.server_port}"
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    def shut_down():
        server.shutdown()
        server.server_close()
        thread.join()

    yield shut_down
    shut_down()


def test_pretrained_tokenizer_comes_from_the_hub_and_stays(hub, capfd):
    trained = load_tokenizer("bpe:300", SHAKESPEARE[:5000])
    (path,) = pathlib.Path("kept").iterdir()
    path.rename("hub.json")
    tokenizer = load_tokenizer("somebody/something")
    assert tokenizer.name == "somebody/something"
    assert tokenizer.digest == trained.digest
    assert "nobody/nothing" in refused(tokenizer="nobody/nothing")
    hub()  # down
    assert load_tokenizer("somebody/something").digest == trained.digest
    assert "cannot be reached" in refused(tokenizer="somebody/other")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "settings", [{"tokenizer": "gpt2"}, {"data": "hf:allenai/c4:en"}]
)
def test_without_network_there_is_one_line_at_once(settings, capfd):
    start = time.monotonic()
    line = refused(**settings)
    assert time.monotonic() - start < 10  # the hub's client would try for 23 seconds
    assert "127.0.0.1:9 cannot be reached" in line
    assert settings.popitem()[1] in line
    assert capfd.readouterr() == ("", "")


# ----------------------------------------------------------------- batches by host


def micro_batches(run, count, elements, index=None):
    """For each step and micro-batch the windows of all hosts, or of one, sorted."""
    hosts = range(count) if index is None else [index]
    parts = [take(data.load(run, Host(n, count)).train, elements) for n in hosts]
    return [
        sorted(bytes(row) for part in parts for row in part[step][micro])
        for step in range(elements)
        for micro in range(run.accumulate)
    ]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_hosts_share_every_micro_batch(accumulate):
    run = config(accumulate=accumulate)
    alone = micro_batches(run, 1, 300)  # more than two epochs
    assert all(len(rows) == 8 // accumulate for rows in alone)
    assert len(set(map(tuple, alone))) == len(alone)
    for count in (2, 4):
        element = next(iter(data.load(run, Host(0, count)).train))
        assert element.shape == (accumulate, 8 // accumulate // count, 17)
        assert micro_batches(run, count, 300) == alone
        assert micro_batches(run, count, 300, index=0) != alone


def test_accumulated_parts_are_the_batch_one_after_the_other():
    whole = take(data.load(config()).train, 100)
    for accumulate in (2, 4, 8):
        parts = take(data.load(config(accumulate=accumulate)).train, 100)
        for one, several in zip(whole, parts, strict=True):
            assert several.shape == (accumulate, 8 // accumulate, 17)
            np.testing.assert_array_equal(one.reshape(several.shape), several)


def test_every_host_evaluates_the_same():
    for run in (config(), config(data=write_set("set", shards=2))):
        alone, one, other = (
            data.load(run, host) for host in (Host(), Host(0, 2), Host(1, 2))
        )
        for loaded in (one, other):
            np.testing.assert_array_equal(loaded.validation, alone.validation)
            assert loaded.digest == alone.digest


@pytest.mark.parametrize("shards", [1, 4, 6])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_hosts_share_the_documents_of_a_streamed_set(shards, count):
    source = hf_stream.open_source(write_set("set", shards=shards))
    epochs = [first_epochs(source, Host(n, count)) for n in range(count)]
    for epoch in range(3):
        assert all(epochs[n][epoch] for n in range(count))
        together = [text for n in range(count) for text in epochs[n][epoch]]
        assert sorted(together) == sorted(DOCUMENTS)


def test_streamed_batches_have_the_shape_of_a_hosts_part():
    run = config(data=write_set("set"), accumulate=2)
    element = next(iter(data.load(run, Host(1, 2)).train))
    assert element.shape == (2, 2, 17)


def test_a_host_without_documents_is_an_error():
    run = config(data=write_set("set", DOCUMENTS[-2:]), batch_size=4)
    assert next(iter(data.load(run, Host(1, 4)).train)).shape == (1, 1, 17)
    with pytest.raises(UsageError, match="no document for this host"):
        next(iter(data.load(run, Host(2, 4)).train))


@pytest.mark.parametrize(
    ("settings", "host"),
    [
        ({"accumulate": 3}, Host()),
        ({"accumulate": 16}, Host()),
        ({"accumulate": 4}, Host(0, 4)),
        ({}, Host(0, 3)),
    ],
)
def test_batches_that_cannot_be_divided(settings, host):
    with pytest.raises(UsageError) as error:
        data.load(config(**settings), host)
    line = str(error.value)
    assert "8 sequences" in line and "\n" not in line
    assert f"{settings.get('accumulate', 1)} equal parts" in line
    assert (f"{host.count} hosts" in line) == (host.count > 1)


# ------------------------------------------------------------------------ resuming


@pytest.fixture(params=["file", "set", "shards", "long documents"])
def resumable(request, monkeypatch):
    """Data with short epochs and every kind of boundary in a few batches."""
    monkeypatch.setattr(hf_stream, "SHUFFLED", 7)
    monkeypatch.setattr(hf_stream, "TOGETHER", 3)
    monkeypatch.setattr(data, "READY", 1)
    run = config(accumulate=2, batch_size=4, sequence_length=24)
    if request.param == "file":
        write("few.txt", SHAKESPEARE[:900])
        return data.load(config(data="few.txt", accumulate=2, batch_size=4))
    documents = [SHAKESPEARE[300 * n :][:300] for n in range(4)]
    name = {
        "set": lambda: write_set("set", DOCUMENTS[:10]),
        "shards": lambda: write_set("set", DOCUMENTS[:10], shards=4),
        "long documents": lambda: write_set("set", documents, shards=2),
    }[request.param]()
    run = config(data=name, tokenizer="bpe:280", accumulate=2, batch_size=4)
    return data.load(run, Host(1, 2))


def test_resuming_is_exact_at_every_step(resumable):
    iterator = iter(resumable.train)
    states, elements = [], []
    for _ in range(14):
        states.append(json.dumps(iterator.get_state()))
        elements.append(next(iterator))
    assert len({element.tobytes() for element in elements}) > 9
    used = iter(resumable.train)
    for n in (5, 0, *range(1, 12)):
        fresh = iter(resumable.train)
        for other in (used, fresh) if n < 6 else (fresh,):
            other.set_state(json.loads(states[n]))
            assert json.dumps(other.get_state()) == states[n]
            np.testing.assert_array_equal(take(other, 2), elements[n : n + 2])


def test_iterators_are_independent(resumable):
    expected = take(resumable.train, 12)
    one, other = iter(resumable.train), iter(resumable.train)
    for n in range(6):
        np.testing.assert_array_equal(next(one), expected[2 * n])
        next(one)
        np.testing.assert_array_equal(next(other), expected[n])


def test_state_survives_a_checkpoint(resumable, tmp_path):
    iterator = iter(resumable.train)
    take(iterator, 5)
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    with ocp.CheckpointManager(tmp_path / "run", options=options) as manager:
        save = grain.checkpoint.CheckpointSave(iterator)
        weights = ocp.args.StandardSave({"x": np.arange(3)})
        manager.save(5, args=ocp.args.Composite(state=weights, data=save))
    expected = take(iterator, 10)

    fresh = iter(resumable.train)
    with ocp.CheckpointManager(tmp_path / "run", options=options) as manager:
        restore = grain.checkpoint.CheckpointRestore(fresh)
        restored = manager.restore(
            manager.latest_step(),
            args=ocp.args.Composite(state=ocp.args.StandardRestore(), data=restore),
        )
    np.testing.assert_array_equal(restored["state"]["x"], np.arange(3))
    np.testing.assert_array_equal(take(restored["data"], 10), expected)


def test_position_in_files_is_the_number_of_batches_for_any_number_of_hosts():
    run = config(accumulate=2)
    iterator = iter(data.load(run).train)
    take(iterator, 7)
    state = iterator.get_state()
    assert list(state.values()) == [7]
    expected = sorted(bytes(row) for row in next(iterator).reshape(-1, 17))
    found = []
    for n in range(4):
        part = iter(data.load(run, Host(n, 4)).train)
        part.set_state(state)
        found += [bytes(row) for row in next(part).reshape(-1, 17)]
    assert sorted(found) == expected


def test_stream_refuses_another_number_of_hosts():
    run = config(data=write_set("set"))
    iterator = iter(data.load(run, Host(1, 4)).train)
    next(iterator)
    for host in (Host(1, 2), Host(), Host(2, 4)):
        with pytest.raises(UsageError, match="saved on 4,") as error:
            iter(data.load(run, host).train).set_state(iterator.get_state())
        assert "\n" not in str(error.value)


def test_state_of_a_stream_stays_small():
    run = config(data=write_set("set", [SHAKESPEARE[:300_000]] * 2))
    iterator = iter(data.load(run).train)
    for _ in range(300):
        next(iterator)
        assert len(json.dumps(iterator.get_state())) < 2000


def test_order_is_a_function_of_the_seed():
    for source in ("text.txt", write_set("set", shards=4)):
        runs = [config(data=source, seed=seed) for seed in (3, 3, 4)]
        one, same, other = (np.stack(take(data.load(run).train, 20)) for run in runs)
        np.testing.assert_array_equal(one, same)
        assert not np.array_equal(one, other)


# ------------------------------------------------------------------------- caching


@pytest.fixture
def encodings(monkeypatch):
    """Counts how often a text was encoded."""
    calls = []
    encode_all = tokenization.encode_all
    monkeypatch.setattr(
        tokenization,
        "encode_all",
        lambda tokenizer, texts: calls.append(1) or encode_all(tokenizer, texts),
    )
    return calls


def test_text_is_encoded_once(encodings, monkeypatch):
    run = config(tokenizer="bpe:300")
    first = data.load(run)
    assert len(encodings) == 2  # to train on, to evaluate on
    with monkeypatch.context() as patch:
        patch.setattr(tokenization, "train", None)
        again = data.load(run)
    assert len(encodings) == 2
    assert again.digest == first.digest
    np.testing.assert_array_equal(next(iter(again.train)), next(iter(first.train)))
    np.testing.assert_array_equal(again.validation, first.validation)

    assert data.load(config(tokenizer="bpe:301")).digest != first.digest
    assert len(encodings) == 4
    write("changed.txt", SHAKESPEARE[:19_999] + "!")
    data.load(config(data="changed.txt", tokenizer="bpe:300"))
    assert len(encodings) == 6


def owner(array):
    """The object at the bottom of an array's views."""
    while isinstance(array, np.ndarray):
        array = array.base
    return array


def test_encoded_text_is_mapped_from_beside_the_data():
    write("books/one.txt", SHAKESPEARE[:9000])
    _, tokens, _ = text_files.load("books", "bpe:300")
    assert isinstance(owner(tokens.train), mmap.mmap)
    files = list(pathlib.Path("books/.tokens").iterdir())
    assert sorted(path.suffix for path in files) == [".json", ".npy", ".npy"]
    assert not pathlib.Path("cache").exists()
    kept = [np.load(path) for path in files if path.suffix == ".npy"]
    assert sorted(map(len, kept)) == sorted(map(len, tokens))


@pytest.mark.parametrize("obstacle", ["a file", "permissions"])
def test_encoded_text_goes_to_the_users_cache_if_it_must(
    obstacle, encodings, monkeypatch
):
    write("books/one.txt", SHAKESPEARE[:9000])
    if obstacle == "a file":
        write("books/.tokens", "")
    else:  # not by chmod, which does not stop root
        pathlib.Path("books/.tokens").mkdir()
        temporary = tempfile.TemporaryFile

        def refuse(dir):
            if dir.name == ".tokens":
                raise PermissionError(errno.EACCES, "Permission denied")
            return temporary(dir=dir)

        monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    for _ in range(2):
        text_files.load("books", "bpe:300")
        assert len(encodings) == 2
        assert len(list(pathlib.Path("cache/spam_optax").iterdir())) == 3


def test_damaged_tokens_are_made_again(encodings):
    run = config(tokenizer="bpe:300")
    first = data.load(run)
    for path in pathlib.Path(".tokens").glob("*.npy"):
        os.truncate(path, path.stat().st_size // 2)
    again = data.load(run)
    assert len(encodings) == 4
    np.testing.assert_array_equal(again.validation, first.validation)


def test_embedded_text_is_cached_in_the_users_folder():
    data.load(config(data=None, tokenizer=trained_file()))
    assert len(list(pathlib.Path("cache/spam_optax").iterdir())) == 2
    assert not (text_files.SHAKESPEARE.parent / ".tokens").exists()


def trained_file():
    load_tokenizer("bpe:300", SHAKESPEARE[:5000])
    (path,) = pathlib.Path("kept").iterdir()
    return str(path)


def test_no_folder_to_write_to(monkeypatch):
    write("books/one.txt", SHAKESPEARE[:9000])
    write("books/.tokens", "")
    write("file", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "file")
    line = refused(data="books", tokenizer="bpe:300")
    assert "cannot write" in line and "XDG_CACHE_HOME" in line
    line = refused(data=write_set("set"), tokenizer="bpe:300")
    assert "cannot write" in line and "file" in line


def test_a_large_text_is_never_held_whole(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    text = SHAKESPEARE * 9
    for name in ("a.txt", "b.txt"):
        write(f"books/{name}", text)
    tracemalloc.start()
    try:
        _, tokens, _ = text_files.load("books", "bytes")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert np.concatenate(tokens).tobytes() == f"{text}\n{text}".encode()
    assert peak < len(text) / 2


# -------------------------------------------------------------------------- digest


def digest(**settings):
    return data.load(config(**settings)).digest


def test_digest_is_of_the_text_and_the_tokenizer():
    before = digest()
    os.utime("text.txt", (0, 0))
    assert digest(sequence_length=8, batch_size=2, seed=9) == before
    assert digest(tokenizer="bpe:300") != before
    write("other.txt", SHAKESPEARE[:19_999] + "!")
    assert digest(data="other.txt") != before
    os.rename("other.txt", "renamed.txt")
    assert digest(data="renamed.txt") != before


def test_digest_depends_on_where_files_end():
    digests = set()
    for cut in (400, 500):
        write("books/a.txt", SHAKESPEARE[:cut])
        write("books/b.txt", SHAKESPEARE[cut:900])
        digests.add(digest(data="books"))
    assert len(digests) == 2


def test_digest_follows_the_contents_of_a_tokenizer_file():
    digests = set()
    for length in (5000, 6000):
        load_tokenizer("bpe:300", SHAKESPEARE[:length])
        (path,) = pathlib.Path("kept").iterdir()
        path.rename("my.json")
        digests.add(digest(tokenizer="my.json"))
    assert len(digests) == 2


def test_digest_of_a_streamed_set():
    source = write_set("set")
    digests = {digest(data=source), digest(data=source, tokenizer="bpe:300")}
    os.utime("set/validation.jsonl", (0, 0))
    assert digest(data=source, sequence_length=8) in digests
    os.rename("set", "moved")
    assert digest(data="hf:moved") in digests
    for documents in (DOCUMENTS[:-1], ["X" + DOCUMENTS[0][1:], *DOCUMENTS[1:]]):
        digests.add(digest(data=write_set("set", documents)))
    assert len(digests) == 4


# ------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("", ["--data", "a folder", "not ''"]),
        ("nowhere.txt", ["nowhere.txt", "No such file"]),
        ("folder", ["folder", ".txt"]),
        ("*.nothing", ["*.nothing"]),
        ("empty.txt", ["empty.txt", "is empty"]),
        ("short.txt", ["train", "90 bytes", "101"]),
        ("medium.txt", ["validation", "50 bytes", "101"]),
        ("packed.gz", ["packed.gz", "not text but gzip", "--data hf:"]),
        ("packed.*", ["packed.gz", "not text but gzip"]),
        ("x" * 300, ["cannot read the data file xxx", "too long"]),
        ("links", ["links/a.txt", "leads to no file"]),
    ],
)
def test_files_that_are_refused(source, words):
    pathlib.Path("folder").mkdir()
    pathlib.Path("links").mkdir()
    pathlib.Path("links/a.txt").symlink_to("nowhere")
    pathlib.Path("links/.#b.txt").symlink_to("an editor's lock")
    pathlib.Path("packed.gz").write_bytes(gzip.compress(SHAKESPEARE.encode()))
    for name, length in (("empty", 0), ("short", 100), ("medium", 500)):
        write(f"{name}.txt", "x" * length)
    line = refused(data=source, sequence_length=100)
    for word in words:
        assert word in line


def test_text_that_is_not_utf8():
    path = pathlib.Path("latin.txt")
    path.write_bytes("é".encode("latin-1") * 5000)
    for tokenizer in ("bpe:300", trained_file()):
        line = refused(data="latin.txt", tokenizer=tokenizer)
        assert "latin.txt" in line and "UTF-8" in line and "bytes" in line
        assert line.endswith("at byte 0")
    pathlib.Path("copy.txt").write_bytes(path.read_bytes())
    expected = path.read_bytes() + b"\n" + path.read_bytes()
    assert whole_text("*.txt").tobytes() == expected


def test_text_that_vanishes_or_shrinks():
    write("text.txt", SHAKESPEARE[:1000])
    spans = text_files.whole(text_files.find("text.txt"))
    os.truncate("text.txt", 500)
    with pytest.raises(DataError, match="text.txt became shorter"):
        list(text_files.texts(spans))
    os.remove("text.txt")
    for read in (
        lambda: list(text_files.texts(spans)),
        lambda: text_files.digest(spans, tokenization.BYTES),
        lambda: text_files.split_spans(spans),
    ):
        with pytest.raises(DataError, match="data file text.txt: No such file"):
            read()
    write("latin.txt", "x" * 2000)
    with open("latin.txt", "ab") as file:
        file.write(b"\xff" * 9)
    assert refused(data="latin.txt", tokenizer="bpe:300").endswith("at byte 2000")


def test_text_too_short_in_tokens():
    write("short.txt", SHAKESPEARE[:2000])
    line = refused(data="short.txt", tokenizer="bpe:300", sequence_length=180)
    assert "validation part" in line and "tokens" in line and "181" in line


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, ["data files"]),
        ({"train": [], "validation": ["a"]}, ["empty"]),
        ({"train": ["a"], "validation": []}, ["validation", "empty"]),
        ({"train": ["a"]}, ["no split validation or test", "only train"]),
        ({"validation": ["a"]}, ["no split train", "only validation"]),
        ({"train": ["a"], "validation": ["a"]}, ["validation part", "2 bytes", "17"]),
        ({"train": [5], "validation": [6]}, ["column text", "not text"]),
    ],
    ids=str,
)
def test_sets_that_are_refused(files, words, capfd):
    pathlib.Path("set").mkdir()
    for split, texts in files.items():
        write(f"set/{split}.jsonl", json_lines(texts))
    line = refused(data="hf:set")
    for word in ["hf:set", *words] if "17" not in words else words:
        assert word in line
    assert capfd.readouterr() == ("", "")


def test_set_without_the_column():
    write_set("set")
    for path in pathlib.Path("set").iterdir():
        write(path, path.read_text(encoding="utf-8").replace('"text"', '"body"'))
    line = refused(data="hf:set")
    assert "column text" in line and "body" in line


def test_set_with_an_unknown_configuration():
    line = refused(data=f"{write_set('set')}:english")
    assert "hf:set:english" in line and "english" in line


def test_set_that_is_damaged(caplog):
    source = write_set("set")
    write("set/train-00000-of-00001.jsonl", '{"text": "a\n')
    line = refused(data=source)
    assert "train" in line and "JSON" in line
    assert not caplog.records  # the library would log the same


def test_documents_without_text_are_empty_ones(monkeypatch):
    monkeypatch.setattr(hf_stream, "SHUFFLED", 1)
    source = write_set("set", ["a" * 10, None, "b" * 20])
    element = next(iter(data.load(one_row(source, sequence_length=30)).train))
    assert element.tobytes() == b"a" * 10 + b"\n\n" + b"b" * 19


def test_a_program_that_ends_during_a_stream_prints_nothing():
    source = write_set("set", [SHAKESPEARE[:20_000]] * 50)
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "from trainer import config, data;"
        "run = config.RunConfig.from_settings(data=sys.argv[2], tokenizer='bpe:300');"
        "iterator = iter(data.load(run).train);"
        "next(iterator)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program, ROOT / "examples", source],
        env={**os.environ, "HF_HOME": os.path.abspath("hf")},
        capture_output=True,
        text=True,
    )
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")


# ------------------------------------------------------------- windows and batches


def test_split_is_contiguous_and_without_overlap():
    text = bytes(range(200)) * 5
    train, validation = text_files.split(text)
    assert len(validation) == 100
    assert train.tobytes() + validation.tobytes() == text


def test_windows_cover_every_target_once():
    tokens = np.arange(100, dtype=np.uint8)
    windows = text_files.Windows(tokens, 7)
    assert len(windows) == 14
    targets = np.concatenate([windows[i][1:] for i in range(len(windows))])
    np.testing.assert_array_equal(targets, np.arange(1, 99))


def test_batches_are_a_function_of_seed_and_step():
    tokens = np.random.default_rng(0).integers(0, 256, 4000, dtype=np.uint8)
    first = text_files.batches(tokens, 16, 4, seed=3)
    second = text_files.batches(tokens, 16, 4, seed=3)
    in_order = [first[n] for n in range(200)]
    for n in (150, 3, 70):  # no order of access matters
        np.testing.assert_array_equal(second[n], in_order[n])
    other = text_files.batches(tokens, 16, 4, seed=4)
    assert not np.array_equal(other[0], first[0])
    assert first[0].shape == (4, 17)
    assert first[0].dtype == np.uint8


def test_an_epoch_holds_every_window_once_and_epochs_differ():
    tokens = np.arange(161, dtype=np.uint8)  # ten windows, named by their first byte
    data = text_files.batches(tokens, 16, 5, seed=0)
    epochs = [[*data[2 * n][:, 0], *data[2 * n + 1][:, 0]] for n in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(0, 160, 16))
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_evaluation_batches_are_spread_and_bounded():
    tokens = np.arange(241, dtype=np.uint8)
    stack = text_files.evaluation_batches(tokens, 8, batch_size=4, limit=10)
    assert stack.shape == (2, 4, 9)
    starts = stack[:, :, 0].reshape(-1)
    assert starts[0] == 0 and starts[-1] == 232
    assert len(set(starts)) == 8
    assert text_files.evaluation_batches(tokens, 100, 4, 10).shape == (1, 2, 101)
