"""Text files as data: splits, windows, batches, encoded text that is kept, mistakes."""

import errno
import gzip
import mmap
import os
import pathlib
import tempfile
import tracemalloc

import numpy as np
import pytest

from data_sets import (
    ODD,
    SHAKESPEARE,
    config,
    decoder,
    json_lines,
    refused,
    take,
    trained_file,
    whole_text,
    write,
    write_set,
)
from trainer import data
from trainer.data import text_files, tokenization
from trainer.errors import DataError


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
