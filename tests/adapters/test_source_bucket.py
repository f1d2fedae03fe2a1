"""A bucket by obstore's real S3 client, against a small server that speaks S3's listing, ranges and errors."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.bases import BaseModel
from adapters.errors import ConfigInvalid, InvalidRequest, NotFound, SourceChanged, SourceUnavailable
from adapters.sources.bucket import BucketPrefix
from tests.fixtures.adapters import CONFIG_FILE, WEIGHTS_FILE, write_adapter
from tests.fixtures.remotes import S3, Remote, remote

URL = "s3://team/adapters"
STOP = threading.Event()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Remote]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "an-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-secret")
    with remote(S3) as one:
        yield one


@pytest.fixture
def source(s3: Remote, tiny: BaseModel, tmp_path: Path) -> BucketPrefix:
    for name in ("router", "summary"):
        s3.put(f"adapters/{name}", write_adapter(tmp_path / name, tiny))
    return BucketPrefix.open(URL, {"endpoint": s3.url, "region": "us-east-1"})


def fetched(source: BucketPrefix, inner: str, folder: Path) -> Path:
    folder.mkdir()
    source.fetch(source.find(inner), folder, STOP)
    return folder


def test_each_folder_of_the_prefix_is_an_adapter_whatever_else_lies_there(s3: Remote, source: BucketPrefix) -> None:
    s3.objects |= {
        "adapters/README.md": b"x",
        "adapters/half/adapter_config.json": b"{}",
        "adapters/router/checkpoint-5/adapter_config.json": b"{}",
        "other/adapter_config.json": b"{}",
    }
    found = source.look()
    assert [(one.name, one.location) for one in found] == [("router", f"{URL}/router"), ("summary", f"{URL}/summary")]
    for folder in found:
        sizes = {file.name: file.size_bytes for file in folder.files}
        assert sizes == {
            name: len(s3.objects[f"adapters/{folder.name}/{name}"]) for name in (CONFIG_FILE, WEIGHTS_FILE)
        }
    assert len(s3.gets("list-type=2")) == 3, "seven objects, three a page"
    assert all(headers["authorization"].startswith("AWS4-HMAC-SHA256") for headers in s3.gets("/"))


def test_files_come_in_ranges_of_the_object_that_was_found(s3: Remote, source: BucketPrefix, tmp_path: Path) -> None:
    source.range_bytes = 1000
    folder = fetched(source, "router", tmp_path / "taken")
    content = s3.objects[f"adapters/router/{WEIGHTS_FILE}"]
    assert (folder / WEIGHTS_FILE).read_bytes() == content
    ranges = [headers["range"] for headers in s3.gets(WEIGHTS_FILE)]
    assert ranges[:2] == ["bytes=0-999", "bytes=1000-1999"] and len(ranges) == -(-len(content) // 1000)
    assert all("if-match" in headers for headers in s3.gets(WEIGHTS_FILE))


def test_an_object_that_is_replaced_meanwhile_is_not_mixed_with_the_old_one(
    s3: Remote, source: BucketPrefix, tmp_path: Path
) -> None:
    found = source.find("router")
    fingerprint = found.fingerprint
    s3.objects[f"adapters/router/{WEIGHTS_FILE}"] = b"x" * len(s3.objects[f"adapters/router/{WEIGHTS_FILE}"])
    with pytest.raises(SourceChanged):
        source.fetch(found, tmp_path, STOP)
    assert source.find("router").fingerprint != fingerprint
    del s3.objects[f"adapters/router/{CONFIG_FILE}"]
    (tmp_path / "again").mkdir()
    with pytest.raises(SourceChanged):
        source.fetch(found, tmp_path / "again", STOP)


def test_an_object_of_another_size_than_the_listing_says_is_not_taken(
    s3: Remote, source: BucketPrefix, tmp_path: Path
) -> None:
    s3.claims[f"adapters/router/{WEIGHTS_FILE}"] = 10
    with pytest.raises(SourceChanged):
        fetched(source, "router", tmp_path / "taken")


@pytest.mark.parametrize(("status", "says"), [(403, "check the credentials"), (500, "answers 500")])
def test_a_bucket_that_refuses_or_fails_is_told_of_without_its_url_or_key(
    s3: Remote, source: BucketPrefix, tmp_path: Path, status: int, says: str
) -> None:
    found = source.find("router")
    s3.status = status
    for work in (source.look, lambda: source.find("router"), lambda: source.fetch(found, tmp_path, STOP)):
        for path in tmp_path.glob("adapter_*"):
            path.unlink()
        with pytest.raises(SourceUnavailable, match=says) as caught:
            work()
        assert "127.0.0.1" not in caught.value.message and "an-id" not in caught.value.message


def test_a_bucket_that_is_not_there_is_told_as_that(source: BucketPrefix, s3: Remote) -> None:
    gone = BucketPrefix.open(URL, {"endpoint": "http://127.0.0.1:9", "region": "us-east-1"})
    with pytest.raises(SourceUnavailable, match="cannot be reached"):
        gone.look()


def test_a_place_is_inside_by_whole_segments_only(source: BucketPrefix) -> None:
    assert source.inner(f"{URL}/router") == source.inner(f"{URL}/router/") == "router"
    assert source.inner(f"{URL}/old/router") == "old/router"
    assert source.inner("s3://team/adapters-of-others/router") is None
    assert source.inner("s3://other/adapters/router") is None
    for text in (f"{URL}/../secret", f"{URL}//router", f"{URL}/"):
        with pytest.raises(InvalidRequest):
            source.inner(text)
    with pytest.raises(NotFound):
        source.find("absent")


def test_the_three_clouds_are_opened_by_their_urls() -> None:
    for url, options in (
        (URL, {"region": "us-east-1"}),
        ("gs://team/adapters", {"skip_signature": "true"}),
        ("az://team/adapters", {"account_name": "acme", "access_key": "eHg="}),
    ):
        assert BucketPrefix.open(url, options).inner(f"{url}/router") == "router"


def test_options_that_the_store_does_not_know_are_refused_at_the_start() -> None:
    with pytest.raises(ConfigInvalid, match="cannot be opened"):
        BucketPrefix.open(URL, {"no_such_option": "x"})
