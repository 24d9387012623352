"""What the trainer loads: the batches of each host, resuming, the digest."""

import json
import os
import pathlib

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from data_sets import (
    DOCUMENTS,
    SHAKESPEARE,
    config,
    first_epochs,
    load_tokenizer,
    take,
    write,
    write_set,
)
from trainer import data
from trainer.data import Host, hf_stream
from trainer.errors import UsageError

pytestmark = pytest.mark.one_python


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
