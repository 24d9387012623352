"""Data sets of the hub, streamed or local: order, broken shards, lost connections."""

import errno
import gzip
import json
import os
import pathlib
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest

from data_sets import (
    DOCUMENTS,
    ROOT,
    SHAKESPEARE,
    config,
    first_epochs,
    json_lines,
    refused,
    take,
    whole_text,
    write,
    write_set,
)
from trainer import data, hosts, loop
from trainer.data import Host, hf_stream, shards, text_files, tokenization
from trainer.errors import DataError

pytestmark = pytest.mark.one_python


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


@pytest.mark.slow
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
