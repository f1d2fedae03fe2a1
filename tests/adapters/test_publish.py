"""From files to a version: what a publish leaves in registry and store, whether it succeeds or not."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
from pathlib import Path

import pytest

from adapters.errors import AdapterRefused, Conflict, DigestInvalid, NameInvalid, NotFound, StorageDamaged, StorageFull
from adapters.publish import PublishContext, publish, remove_files
from adapters.store import BlobStore, check_digest, disk_error
from adapters.types import DEFAULT_TENANT, VersionStatus
from tests.fixtures.adapters import write_adapter

WHERE = (DEFAULT_TENANT, "router")


def left_in(store: BlobStore) -> list[Path]:
    return store.leftovers()


def test_a_publish_leaves_one_blob_and_one_quarantined_row(tmp_path: Path, context: PublishContext) -> None:
    source = write_adapter(tmp_path / "adapter", context.base)
    (source / "README.md").write_text("hello")
    version = publish(source, "router", context=context, card={"parent": "router@0", "score": 0.9})
    assert (version.status, version.number, version.is_new) == (VersionStatus.QUARANTINED, 1, True)
    assert (version.base_digest, version.rank) == (context.base.digest, 4)
    assert (version.card, version.parent) == ({"parent": "router@0", "score": 0.9}, "router@0")
    assert "file README.md" in version.dropped
    assert version.digest is not None
    context.store.verify(version.digest)
    assert left_in(context.store) == []
    modes = {path.stat().st_mode & 0o777 for path in context.store.folder(version.digest).iterdir()}
    assert modes == {0o444}


def test_u26_the_same_files_again_give_the_same_version(tmp_path: Path, context: PublishContext) -> None:
    source = write_adapter(tmp_path / "adapter", context.base)
    first, again = (publish(source, "router", context=context) for _ in range(2))
    assert (again.number, again.digest, again.is_new) == (1, first.digest, False)
    other = publish(source, "other", context=context)  # another name shares the blob
    assert (other.number, other.digest) == (1, first.digest)
    changed = write_adapter(tmp_path / "changed", context.base, seed=5)
    with pytest.raises(Conflict):
        publish(changed, "router", context=context, number=1)
    assert len(context.registry.versions(*WHERE)) == 1


def test_refused_files_leave_their_reasons_and_no_blob(tmp_path: Path, context: PublishContext) -> None:
    source = write_adapter(tmp_path / "adapter", context.base, config={"r": "8", "lora_alpha": 0})
    with pytest.raises(AdapterRefused) as caught:
        publish(source, "router", context=context)
    assert {problem.path for problem in caught.value.problems} == {"config.r", "config.lora_alpha"}
    (version,) = context.registry.versions(*WHERE)
    assert (version.status, version.digest) == (VersionStatus.REJECTED, None)
    assert {reason["path"] for reason in version.reasons} == {"config.r", "config.lora_alpha"}
    assert (context.store.digests(), left_in(context.store)) == (set(), [])


def test_u17_values_found_bad_while_writing_leave_no_blob(tmp_path: Path, context: PublishContext) -> None:
    source = write_adapter(tmp_path / "adapter", context.base, fill=(float("nan"), 1.0))
    with pytest.raises(AdapterRefused) as caught:
        publish(source, "router", context=context)
    assert caught.value.wire_code == "non_finite"
    assert len(caught.value.problems) == 14
    assert (context.store.digests(), left_in(context.store)) == (set(), [])


def test_u4b_what_cannot_be_served_becomes_an_export_only_version(tmp_path: Path, context: PublishContext) -> None:
    source = write_adapter(tmp_path / "adapter", context.base, rank=128)
    version = publish(source, "router", context=context)
    assert version.status is VersionStatus.EXPORT_ONLY
    assert version.reasons[0]["code"] == "rank_too_large"
    assert context.registry.aliases(*WHERE) == []


def test_a_card_beside_the_adapter_is_kept_and_a_bad_one_refused(tmp_path: Path, context: PublishContext) -> None:
    source = write_adapter(tmp_path / "adapter", context.base)
    (source / "card.json").write_text(json.dumps({"score": 1}))
    assert publish(source, "router", context=context).card == {"score": 1}
    for text, code in (
        ("[1]", "json_invalid"),
        ('{"a": 1, "a": 2}', "duplicate_key"),
        (" " * (2 << 20), "payload_too_large"),
    ):
        (source / "card.json").write_text(text)
        with pytest.raises(AdapterRefused) as caught:
            publish(source, "router", context=context)
        assert caught.value.wire_code == code


def test_u6_a_card_that_names_the_base_by_digest_outweighs_the_path_in_the_config(
    tmp_path: Path, context: PublishContext
) -> None:
    config = {"base_model_name_or_path": "/home/somebody/.cache/hotshoe/bases/tiny"}
    source = write_adapter(tmp_path / "adapter", context.base, config=config)
    for card in (None, {"base": {"digest": "sha256:" + "0" * 64}}, {"base": context.base.digest}):
        with pytest.raises(AdapterRefused) as caught:
            publish(source, "router", context=context, card=card)
        assert caught.value.wire_code == "base_mismatch"
    version = publish(source, "router", context=context, card={"base": {"digest": context.base.digest}})
    assert version.status is VersionStatus.QUARANTINED


def test_u7_a_name_that_is_no_name_leaves_nothing(tmp_path: Path, context: PublishContext) -> None:
    source = write_adapter(tmp_path / "adapter", context.base)
    with pytest.raises(NameInvalid):
        publish(source, "../router", context=context)
    assert (context.registry.adapters(DEFAULT_TENANT), context.store.digests()) == ([], set())


def test_u8_a_digest_has_one_form(context: PublishContext) -> None:
    for digest in (
        "sha256:" + "A" * 64,
        "sha256:" + "0" * 63,
        "md5:" + "0" * 64,
        "../../etc/passwd",
        "",
        "sha256:" + "0" * 64 + "\n",
    ):
        with pytest.raises(DigestInvalid):
            check_digest(digest)
    with pytest.raises(NotFound):
        context.store.verify("sha256:" + "0" * 64)


def test_f12_a_flipped_byte_is_found_and_the_same_upload_heals_it(tmp_path: Path, context: PublishContext) -> None:
    source = write_adapter(tmp_path / "adapter", context.base)
    digest = publish(source, "router", context=context).digest
    assert digest is not None
    path = context.store.folder(digest) / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.chmod(0o644)
    path.write_bytes(data)
    with pytest.raises(StorageDamaged, match="has changed on the disk"):
        context.store.verify(digest)
    assert publish(source, "router", context=context).is_new is False
    context.store.verify(digest)


def test_files_go_when_no_version_needs_them_and_not_before(tmp_path: Path, context: PublishContext) -> None:
    source = write_adapter(tmp_path / "adapter", context.base)
    digest = publish(source, "router", context=context).digest
    publish(source, "other", context=context)
    assert digest is not None
    for name in ("router", "other"):
        assert remove_files(context.registry, context.store, digest) is False
        context.registry.set_status(DEFAULT_TENANT, name, 1, VersionStatus.EXPORT_ONLY)
        context.registry.retire(DEFAULT_TENANT, name, 1)
    assert remove_files(context.registry, context.store, digest) is True
    assert context.store.digests() == set()


def test_sweep_takes_left_overs_and_blobs_nobody_needs(tmp_path: Path, context: PublishContext) -> None:
    kept = publish(write_adapter(tmp_path / "a", context.base), "router", context=context).digest
    orphan = publish(write_adapter(tmp_path / "b", context.base, seed=1), "gone", context=context)
    context.registry.set_status(DEFAULT_TENANT, "gone", 1, VersionStatus.REJECTED)
    staged = context.store.stage()
    (staged / "half").write_bytes(b"x")
    removed = context.store.sweep(context.registry.digests_in_use())
    assert removed == [f".staging/{staged.name}", orphan.digest]
    assert context.store.digests() == {kept}


def test_f7_a_full_disk_leaves_nothing_and_the_next_publish_works(tmp_path: Path, context: PublishContext) -> None:
    source = write_adapter(tmp_path / "adapter", context.base, rank=64)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))  # a write fails half-way, as on a full disk
    try:
        with pytest.raises(StorageFull):
            publish(source, "router", context=context)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert context.registry.adapters(DEFAULT_TENANT) == []
    assert (context.store.digests(), left_in(context.store)) == (set(), [])
    assert publish(source, "router", context=context).number == 1


def test_f7_no_space_and_no_quota_are_storage_full() -> None:
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        assert isinstance(disk_error(OSError(number, os.strerror(number)), Path("/x")), StorageFull)
    assert isinstance(disk_error(OSError(errno.EIO, os.strerror(errno.EIO)), Path("/x")), StorageDamaged)
