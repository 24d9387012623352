"""Tokenizers: bytes, BPE, files and those of the hub."""

import concurrent.futures
import hashlib
import http.server
import json
import pathlib
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from data_sets import (
    ODD,
    ROOT,
    SHAKESPEARE,
    config,
    decoder,
    load_tokenizer,
    refused,
    trained_file,
    whole_text,
    write,
    write_set,
)
from trainer import data, files
from trainer.data import hf_stream, text_files, tokenization
from trainer.errors import UsageError

pytestmark = pytest.mark.one_python


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
