"""WikiText from every layout it is given out in: one text, and a source that is not whole or not safe is refused."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import stat
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelab.config import DataConfig, UsageError
from moelab.text import prepare
from moelab.text.corpora import open_corpus
from moelab.text.detokenize import detokenize, detokenized
from moelab.text.hub import REPOSITORY, REVISION
from moelab.text.wikitext import PUBLISHED

ARTICLE = ' \n = {title} = \n \n The <unk> of {title} has 1 @,@ 000 words ; some @-@ what " quoted " ( so ) . \n \n'
SPLITS = {
    "train": "".join(ARTICLE.format(title=f"Article {i}") for i in range(40)),
    "valid": ARTICLE.format(title="Valid"),
    "test": ARTICLE.format(title="Test") * 2,
}


def rows_of(text: str) -> list[str]:
    """What the hub's parquet files hold of a text: a row a line, an empty one for an empty line."""
    return [line if line.strip() else "" for line in text.splitlines(keepends=True)]


def original(folder: Path, suffix: str = "tokens") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, text in SPLITS.items():
        (folder / f"wiki.{split}.{suffix}").write_text(text)
    return folder


def parquet(folder: Path, train_shards: int = 2) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, text in SPLITS.items():
        rows, stem = rows_of(text), "validation" if split == "valid" else split
        count = train_shards if split == "train" else 1
        size = len(rows) // count + 1  # so that a shard ends inside an article
        for number in range(count):
            part = pa.table({"text": rows[number * size : (number + 1) * size]})
            pq.write_table(part, folder / f"{stem}-{number:05}-of-{count:05}.parquet", row_group_size=7)
    return folder


def zipped(folder: Path, name: str = "wikitext-2") -> Path:
    with zipfile.ZipFile(folder / "wikitext.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for split, text in SPLITS.items():
            archive.writestr(f"{name}/wiki.{split}.tokens", text)
    return folder / "wikitext.zip"


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "original": original,
    "original, a folder up": lambda folder: original(folder / "wikitext-2").parent,
    "parquet": parquet,
    "parquet, one shard": lambda folder: parquet(folder, 1),
    "parquet, a folder up": lambda folder: parquet(folder / "wikitext-2-v1").parent,
    "zip": zipped,
    "zip, another folder": lambda folder: zipped(folder, "anything"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_text(layout: str, tmp_path: Path) -> None:
    corpus = open_corpus(DataConfig(data="wikitext-2", source=LAYOUTS[layout](tmp_path)))
    for split, text in SPLITS.items():
        heard: list[int] = []
        pieces = list(corpus.pieces(split, heard.append))
        assert "".join(piece or "" for piece in pieces) == text
        assert pieces.count(None) == text.count(" \n = ")
        assert sum(heard) == pytest.approx(corpus.size(split), rel=0.01)


def test_the_raw_form_has_a_suffix_of_its_own(tmp_path: Path) -> None:
    source = original(tmp_path, "raw")
    assert open_corpus(DataConfig(data="wikitext-103-raw", source=source)).splits() == ("train", "valid", "test")
    with pytest.raises(UsageError, match=r"none of wiki.train.tokens, wiki.valid.tokens, wiki.test.tokens is there"):
        open_corpus(DataConfig(data="wikitext-103", source=source))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (parquet(tmp_path) / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(UsageError, match="shard 1 of the 2 of train is missing"):
        open_corpus(DataConfig(data="wikitext-2", source=tmp_path))


@pytest.mark.parametrize("name", ["train-00002-of-00002", "train-00000-of-00001", "train", "train-0-of-2"])
def test_shards_that_do_not_go_together_are_refused(name: str, tmp_path: Path) -> None:
    parquet(tmp_path)
    (tmp_path / "test-00000-of-00001.parquet").rename(tmp_path / f"{name}.parquet")
    with pytest.raises(UsageError, match=r"does not go with .*; leave one set of shards there"):
        open_corpus(DataConfig(data="wikitext-2", source=tmp_path))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("layout", ["original", "zip"])
def test_a_source_without_a_split_is_refused_when_that_is_asked_for(layout: str, split: str, tmp_path: Path) -> None:
    source = LAYOUTS[layout](tmp_path)
    if layout == "zip":
        with zipfile.ZipFile(source, "w") as archive:
            for other in SPLITS.keys() - {split}:
                archive.writestr(f"wikitext-2/wiki.{other}.tokens", SPLITS[other])
    else:
        (source / f"wiki.{split}.tokens").unlink()
    data = DataConfig(data="wikitext-2", source=source, tokenizer="bytes")
    with pytest.raises(UsageError, match=f"has no {split} split of wikitext-2, only"):
        prepare(data, splits=tuple(SPLITS))


def strange_zip(folder: Path, name: str, mode: int = 0o100644) -> Path:
    member = zipfile.ZipInfo(name)
    member.external_attr = mode << 16
    with zipfile.ZipFile(zipped(folder), "a") as archive:
        archive.writestr(member, "/etc/passwd")
    return folder / "wikitext.zip"


@pytest.mark.parametrize("name", ["../wiki.train.tokens", "/etc/x", "a/../../x", "..\\x", "C:\\x", "C:x"])
def test_a_zip_with_a_member_outside_its_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="lies outside the archive's own folder"):
        open_corpus(DataConfig(data="wikitext-2", source=strange_zip(tmp_path, name)))


def test_a_zip_with_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    source = strange_zip(tmp_path, "wikitext-2/link", stat.S_IFLNK | 0o777)
    with pytest.raises(UsageError, match="'wikitext-2/link' is a symbolic link"):
        open_corpus(DataConfig(data="wikitext-2", source=source))


def test_a_zip_with_two_of_a_file_is_refused_unless_a_folder_has_the_name(tmp_path: Path) -> None:
    source = zipped(tmp_path)
    with zipfile.ZipFile(source, "a") as archive:
        archive.writestr("other/wiki.test.tokens", "other")
    corpus = open_corpus(DataConfig(data="wikitext-2", source=source))
    assert "".join(piece or "" for piece in corpus.pieces("test")) == SPLITS["test"]
    with pytest.raises(UsageError, match=r"has wikitext-2/wiki.test.tokens and other/wiki.test.tokens"):
        open_corpus(DataConfig(data="wikitext-103", source=source))


def test_a_damaged_zip_is_one_line(tmp_path: Path) -> None:
    source = zipped(tmp_path)
    content = bytearray(source.read_bytes())
    content[60:90] = bytes(30)  # inside the first member
    source.write_bytes(content)
    data = DataConfig(data="wikitext-2", source=source, tokenizer="bytes")
    with pytest.raises(UsageError, match=r"wiki.train.tokens cannot be read") as refused:
        prepare(data)
    assert "\n" not in str(refused.value)
    source.write_bytes(b"no zip")
    with pytest.raises(UsageError, match="not a zip archive that can be read"):
        prepare(data)


def test_a_changed_shard_or_archive_is_prepared_again(tmp_path: Path) -> None:
    for layout in ("parquet", "zip"):
        source = LAYOUTS[layout](tmp_path / layout) if layout == "parquet" else zipped(tmp_path)
        data = DataConfig(data="wikitext-2", source=source, tokenizer="bytes")
        before = prepare(data, splits=("test",)).fingerprint
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(SPLITS, "test", SPLITS["test"] + ARTICLE.format(title="New"))
            LAYOUTS[layout](source if layout == "parquet" else tmp_path)
        assert prepare(data, splits=("test",)).fingerprint != before


# Detokenized


def test_the_marks_of_tokenisation_are_removed() -> None:
    text = ARTICLE.format(title="A")
    assert detokenize(text) == '\n= A =\n\nThe <unk> of A has 1,000 words; some-what "quoted" (so).\n\n'
    assert detokenize(" = = = Early years = = = \n the dogs ' bones , 5 ° C , 3 @.@ 5 ! \n") == (
        " === Early years ===\nthe dogs' bones, 5°C, 3.5!\n"
    )
    assert detokenize("it 's here") == "it's here"
    assert detokenize("he ; ' we ' [ sic ] { a } : all") == "he; 'we' [sic] {a}: all"


@pytest.mark.parametrize("text", ['"' + " " * 20_000, "( a " * 20_000, "[" * 20_000 + "]", "' " * 20_001])
def test_marks_without_a_partner_take_no_time(text: str) -> None:
    """A search that starts again at every blank would take hours."""
    assert len(detokenize(text)) <= len(text)


@given(st.lists(st.text(" =\n'\"()[]<unk>@-@,.sab", max_size=60), min_size=1, max_size=5), st.integers(1, 9))
def test_an_article_is_detokenized_as_a_whole_whatever_the_pieces(articles: list[str], size: int) -> None:
    pieces = (part for text in articles for part in [*(text[i : i + size] for i in range(0, len(text), size)), None])
    whole = [text for text in map(detokenize, articles) if text]
    assert [piece for piece in detokenized(pieces) if piece is not None] == whole


def test_natural_text_has_the_words_of_the_published_one_and_bytes_of_its_own(tmp_path: Path) -> None:
    data = DataConfig(data="wikitext-2", source=original(tmp_path), tokenizer="bytes")
    as_published = prepare(data, splits=("test",))
    natural = prepare(
        DataConfig(data="wikitext-2", source=tmp_path, tokenizer="bytes", detokenize=True), splits=("test",)
    )
    assert natural.name == "wikitext-2, detokenized"
    assert natural.splits["test"].words == as_published.splits["test"].words
    assert natural.splits["test"].documents == as_published.splits["test"].documents
    tokens = natural.splits["test"].tokens
    text = natural.tokenizer.decode(tokens[tokens != natural.tokenizer.end_of_text])
    first, second = SPLITS["test"].split(" = Test")[1:]  # an article begins at its title
    assert text == detokenize(f" \n = Test{first}") + detokenize(f" = Test{second}")
    assert natural.splits["test"].bytes == len(text.encode())
    assert (as_published.form, natural.form) == (
        "tokenised form, as published", "tokenised form, detokenized as GPT-2 was evaluated",
    )  # fmt: skip


@pytest.mark.parametrize("data", ["stdlib", "text:x"])
def test_text_that_is_natural_is_not_detokenized(data: str) -> None:
    with pytest.raises(UsageError, match=f"detokenize = True: {data} is natural text already"):
        open_corpus(DataConfig(data=data, detokenize=True))


# The published text


def test_words_that_are_not_the_published_number_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(DataConfig(data="wikitext-2", source=original(tmp_path), tokenizer="bytes"), splits=("valid",))
    said = capsys.readouterr().err
    assert "words where the published split has 217,646; figures on it cannot be set beside published ones" in said


def test_wikitext_2_given_as_wikitext_103_is_said(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They have the same words, and other `<unk>`."""
    data = DataConfig(data="wikitext-103", source=shared_data / "wikitext-2", tokenizer="bytes", detokenize=True)
    prepare(data, splits=("test",))
    assert "1,256,449 bytes where the published split has 1,281,077" in capsys.readouterr().err


def test_the_published_splits_come_out_of_parquet_and_zip_byte_for_byte(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published = shared_data / "wikitext-103"
    texts = {split: (published / f"wiki.{split}.tokens").read_text() for split in ("valid", "test")}
    with pytest.MonkeyPatch.context() as patch:
        for split, text in texts.items():
            patch.setitem(SPLITS, split, text)
        sources = [published, parquet(tmp_path / "parquet"), zipped(tmp_path)]
    assert len(rows_of(texts["valid"])) == 3_760  # the hub's number of rows
    assert len(rows_of(texts["test"])) == 4_358
    found = [
        prepare(DataConfig(data="wikitext-103", source=source, tokenizer="bytes"), splits=("valid", "test"))
        for source in sources
    ]
    assert len({text.fingerprint for text in found}) == 1
    for split in ("valid", "test"):
        part = found[0].splits[split]
        assert (part.words, part.bytes) == PUBLISHED["wikitext-103"][split]
    tokens = found[0].splits["test"].tokens
    assert found[0].tokenizer.decode(tokens[tokens != 256]) == texts["test"]
    assert capsys.readouterr().err == ""


def test_the_source_and_form_are_recorded(tmp_path: Path, home: Path) -> None:
    text = prepare(DataConfig(data="wikitext-2", source=zipped(tmp_path), tokenizer="bytes"), splits=("test",))
    (meta,) = home.rglob("meta.json")
    assert json.loads(meta.read_text())["source"] == text.source == str(tmp_path / "wikitext.zip")


# From a hub: a server of this machine with the hub's routes, and what goes wrong between the two

PREFIX = f"/datasets/{REPOSITORY}/resolve/{REVISION}/"


@dataclass
class FakeHub:
    """Files by their path in the repository; `faults` are what a file is served with."""

    files: dict[str, bytes]
    faults: dict[str, str] = field(default_factory=dict)
    served: list[tuple[str, str, str]] = field(default_factory=list)
    """(method, path in the repository, Range header) of every request."""
    address: str = ""

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        on_disk = request.path.startswith("/blobs/")  # where a large file lies, to which the hub redirects
        name = request.path.removeprefix("/blobs/").removeprefix(PREFIX)
        byte_range = request.headers.get("Range", "")
        self.served.append((request.command, name, byte_range))
        content, fault = self.files.get(name), self.faults.get(name)
        if content is None or fault == "404":
            request.send_response(404)
            request.send_header("X-Error-Code", "EntryNotFound")
            request.send_header("X-Repo-Commit", REVISION)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        if not on_disk:
            request.send_response(302)
            request.send_header("Location", f"{self.address.replace('127.0.0.1', 'localhost')}/blobs/{name}")
            request.send_header("X-Repo-Commit", "0" * 40 if fault == "another commit" else REVISION)
            request.send_header("X-Linked-Size", str(len(content)))
            request.send_header("X-Linked-ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        start = int(byte_range.removeprefix("bytes=").partition("-")[0] or 0)
        if fault == "wrong checksum":
            content = content[:-1] + bytes([content[-1] ^ 1])
        if fault == "truncated":
            content = content[: len(content) // 2]
        part = content[start:]
        request.send_response(206 if byte_range else 200)
        if byte_range:
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        request.send_header("Content-Length", str(len(part)))
        request.end_headers()
        if fault in ("dropped once", "dropped always"):
            part = part[: len(part) // 2] if fault == "dropped once" else b""
            if fault == "dropped once":
                del self.faults[name]
            request.close_connection = True
        request.wfile.write(part)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    folder = parquet(tmp_path / "repository" / "wikitext-2-v1", 1)
    fake = FakeHub({f"wikitext-2-v1/{path.name}": path.read_bytes() for path in folder.iterdir()})

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            fake.answer(self)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        fake.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield fake
        server.shutdown()


def prepared(hub: FakeHub, folder: Path, *words: str, **environment: str) -> tuple[int, str, str]:
    """Status, output and errors of `moelab data prepare wikitext-2` against a hub: it reads its address on start."""
    run = subprocess.run(
        [sys.executable, "-m", "moelab", "data", "prepare", "wikitext-2", "--tokenizer", "bytes", *words],
        env=os.environ | {"HF_ENDPOINT": hub.address, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "0"}
        | {"MOELAB_HOME": str(folder / "home")} | environment,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return run.returncode, run.stdout, run.stderr


def tokens(folder: Path) -> dict[str, bytes]:
    return {
        json.loads((path.parent / "meta.json").read_text())["split"]: path.read_bytes()
        for path in sorted((folder / "home").rglob("tokens.bin"))
    }


def text_of(raw: bytes) -> str:
    ids = memoryview(raw).cast("H").tolist()
    return bytes(i for i in ids if i < 256).decode()


def test_a_hub_gives_the_text_and_is_asked_once(hub: FakeHub, tmp_path: Path) -> None:
    status, out, errors = prepared(hub, tmp_path)
    assert (status, errors.count("Traceback")) == (0, 0)
    assert f"wikitext-2 from {REPOSITORY} (wikitext-2-v1) at {REVISION}" in out
    assert {split: text_of(raw) for split, raw in tokens(tmp_path).items()} == SPLITS
    assert all(REVISION in json.loads(p.read_text())["source"] for p in (tmp_path / "home").rglob("meta.json"))
    asked = len(hub.served)
    # Offline, and with the hub's cache gone: what was prepared needs neither.
    (tmp_path / "hf").rename(tmp_path / "elsewhere")
    assert prepared(hub, tmp_path, HF_HUB_OFFLINE="1") == (0, out, "")
    # Offline with the cache: another tokenizer is prepared from it.
    (tmp_path / "elsewhere").rename(tmp_path / "hf")
    assert prepared(hub, tmp_path, "--tokenizer", "bpe:300", HF_HUB_OFFLINE="1")[0] == 0
    assert len(hub.served) == asked


def test_a_dropped_connection_goes_on_where_it_stopped(hub: FakeHub, tmp_path: Path) -> None:
    name = "wikitext-2-v1/train-00000-of-00001.parquet"
    pieces = 10 << 20  # the hub's client keeps what it has in pieces of this size
    noise = [os.urandom(1 << 20)] * 25
    rows = rows_of(SPLITS["train"])
    table = pa.table({"text": rows + [None] * len(noise), "noise": [b""] * len(rows) + noise})
    pq.write_table(table, tmp_path / "large.parquet", compression="none", use_dictionary=False)
    hub.files[name] = (tmp_path / "large.parquet").read_bytes()
    hub.faults[name] = "dropped once"
    assert prepared(hub, tmp_path)[0] == 0
    ranges = [byte_range for method, path, byte_range in hub.served if path == name and method == "GET"]
    assert ranges == ["", f"bytes={pieces}-"]
    assert text_of(tokens(tmp_path)["train"]).startswith(SPLITS["train"])


FAULTS = {
    "404": "answers 404 for",
    "another commit": f"answers with commit {'0' * 40}",
    "truncated": "could not be fetched from",
    "dropped always": "could not be fetched from",
    "wrong checksum": "fails its checksum and was deleted",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_and_the_next_call_goes_on(hub: FakeHub, tmp_path: Path, fault: str) -> None:
    name = "wikitext-2-v1/validation-00000-of-00001.parquet"
    hub.faults[name] = fault
    status, out, errors = prepared(hub, tmp_path)
    assert (status, out) == (1, "")
    (line,) = [line for line in errors.splitlines() if "published split" not in line]
    assert line.startswith("moelab: ")
    assert name in line
    assert FAULTS[fault] in line
    assert "give --source" in line
    assert set(tokens(tmp_path)) == {"train"}
    hub.faults.clear()
    hub.served.clear()
    assert prepared(hub, tmp_path)[0] == 0
    assert {split: text_of(raw) for split, raw in tokens(tmp_path).items()} == SPLITS
    assert not any("train" in path for _, path, _ in hub.served)


def test_a_file_that_is_no_parquet_is_deleted_and_fetched_again(hub: FakeHub, tmp_path: Path) -> None:
    name = "wikitext-2-v1/test-00000-of-00001.parquet"
    hub.files[name], whole = b"<html>sign in</html>", hub.files[name]
    status, _, errors = prepared(hub, tmp_path)
    assert status == 1
    assert "it was deleted from the hub's cache: try again" in errors
    hub.files[name] = whole
    assert prepared(hub, tmp_path)[0] == 0


def test_without_a_network_the_line_comes_at_once(tmp_path: Path) -> None:
    nobody = FakeHub({}, address="http://127.0.0.1:9")
    status, out, errors = prepared(nobody, tmp_path)
    assert (status, out, len(errors.splitlines())) == (1, "", 1)
    assert "could not be fetched from http://127.0.0.1:9" in errors
    status, out, errors = prepared(nobody, tmp_path, HF_HUB_OFFLINE="1")
    assert (status, out, len(errors.splitlines())) == (1, "", 1)
    assert "is not in the hub's cache, and HF_HUB_OFFLINE is set; give --source" in errors
