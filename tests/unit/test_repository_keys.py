"""Keys: passphrases, kits, recipients, machines, and all that somebody may get wrong or tamper with."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from remetal.errors import DamagedError, RefusedError, RemetalError, UsageError
from remetal.repository.catalog import open_catalog
from remetal.repository.config import Config, decode_config, encode_config
from remetal.repository.machines import MachineKeys, state_folder
from remetal.repository.objects import SLOTS, decode_json, encode_json, put_named
from remetal.repository.recipients import RecipientKey, put_recipient
from remetal.repository.repository import (
    accept_recipients,
    add_passphrase,
    add_recipient,
    change_passphrase,
    enroll_machine,
    init_repository,
    list_keys,
    load_machine_keys,
    make_kit,
    new_recipients,
    open_repository,
    remove_passphrase,
    save_machine_keys,
    unlock_with_kit,
    unlock_with_passphrase,
)
from remetal.repository.session import open_session
from remetal.repository.slots import MAX_SLOTS, Slot
from tests.repositories import CHUNK, PASSPHRASE, MemoryStore, Site, backup, make_site, restore

_SITE = make_site()


@pytest.fixture
def site() -> Site:
    return _SITE.copy()


def names(site: Site, prefix: str) -> list[str]:
    return [entry.name for entry in site.store.entries(prefix)]


def test_the_passphrase_and_the_kit_open_the_same_key(site: Site) -> None:
    key = unlock_with_passphrase(site.repository, PASSPHRASE)
    assert key.seed == site.key.seed
    assert unlock_with_kit(site.repository, make_kit(site.repository, key).text()).id == key.id
    assert key.id == site.repository.config.id


def test_a_passphrase_typed_with_other_composition_of_accents_is_the_same(site: Site) -> None:
    add_passphrase(site.repository, site.key, "Gr\u00fc\u00dfe aus K\u00f6ln")
    assert unlock_with_passphrase(site.repository, "Gru\u0308\u00dfe aus Ko\u0308ln").id == site.key.id


def test_secrets_do_not_show_in_representations(site: Site) -> None:
    shown = repr(site.key) + repr(site.keys) + repr(site.keys.domain) + repr(make_kit(site.repository, site.key))
    for secret in (site.key.seed, site.keys.stored.id_key, site.keys.stored.signing_seed):
        assert repr(secret) not in shown


def test_a_wrong_passphrase_is_refused(site: Site) -> None:
    with pytest.raises(RefusedError, match="opens nothing"):
        unlock_with_passphrase(site.repository, "wrong")


def test_an_empty_passphrase_is_a_mistake(site: Site) -> None:
    with pytest.raises(UsageError):
        add_passphrase(site.repository, site.key, "  ")
    with pytest.raises(UsageError):
        init_repository(MemoryStore(), passphrase="")


def test_without_any_passphrase_the_kit_is_asked_for(site: Site) -> None:
    site.store.delete(names(site, SLOTS)[0])
    with pytest.raises(RefusedError) as caught:
        unlock_with_passphrase(site.repository, PASSPHRASE)
    assert "kit" in caught.value.hint


@pytest.mark.parametrize("size", [0, 1000, 32 << 10, 96 << 10, 8 << 20])
def test_chunk_sizes_that_format_1_does_not_know(size: int) -> None:
    with pytest.raises(UsageError):
        init_repository(MemoryStore(), passphrase="x", chunk_size=size)


def test_passphrases_come_and_go(site: Site) -> None:
    with pytest.raises(RefusedError, match="only passphrase"):
        remove_passphrase(site.repository, PASSPHRASE)
    add_passphrase(site.repository, site.key, "second")
    assert unlock_with_passphrase(site.repository, "second").id == site.key.id
    assert len(remove_passphrase(site.repository, PASSPHRASE)) == 1
    with pytest.raises(RefusedError):
        unlock_with_passphrase(site.repository, PASSPHRASE)
    change_passphrase(site.repository, "second", "third")
    assert unlock_with_passphrase(site.repository, "third").id == site.key.id
    for gone in ("second", PASSPHRASE):
        with pytest.raises(RefusedError):
            remove_passphrase(site.repository, gone)
    assert [each.kind for each in list_keys(site.repository)] == ["recipient", "passphrase", "machine"]


def test_each_recipient_keeps_a_passphrase(site: Site) -> None:
    add_recipient(site.repository, site.key, "escrow")
    for passphrase in (PASSPHRASE, "escrow"):
        with pytest.raises(RefusedError, match="the only passphrase of recipient"):
            remove_passphrase(site.repository, passphrase)
    assert len(remove_passphrase(site.repository, "escrow", even_last=True)) == 1
    with pytest.raises(RefusedError, match="the repository's only passphrase"):
        remove_passphrase(site.repository, PASSPHRASE, even_last=True)
    add_passphrase(site.repository, site.key, "second")
    assert len(remove_passphrase(site.repository, PASSPHRASE)) == 1


def test_a_passphrase_that_might_never_be_tried_is_refused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remetal.repository.slots.MAX_SLOTS", 3)
    add_passphrase(site.repository, site.key, "second")
    add_passphrase(site.repository, site.key, "third")
    with pytest.raises(RefusedError, match="has 3 passphrases, and cannot have more"):
        add_passphrase(site.repository, site.key, "fourth")
    with pytest.raises(RefusedError, match="has 3 passphrases, and cannot have more"):
        add_recipient(site.repository, site.key, "fourth")
    change_passphrase(site.repository, "third", "fourth")


def test_init_leaves_a_repository_alone(site: Site) -> None:
    before = dict(site.store.objects)
    with pytest.raises(RefusedError, match="already"):
        init_repository(site.store, passphrase="x")
    site.store.delete("config")
    backup(site, b"x")
    with pytest.raises(RefusedError, match="config is missing"):
        init_repository(site.store, passphrase="x")
    assert before.items() - site.store.objects.items() == {("config", before["config"])}


def test_no_repository_is_told_with_what_to_do() -> None:
    with pytest.raises(RefusedError) as caught:
        open_repository(MemoryStore())
    assert "remetal init" in caught.value.hint


def test_a_newer_format_is_refused_with_its_number(site: Site) -> None:
    newer = msgspec.structs.replace(site.repository.config, format=2)
    for data in (encode_config(newer), b'{"format": 2, "new": {"things": []}}\nand lines\n'):
        site.store.objects["config"] = data
        with pytest.raises(RefusedError, match="format 2"):
            open_repository(site.store)


@pytest.mark.parametrize(
    "config",
    [
        Config(format=0, id="0" * 32, chunk_size=CHUNK, created=""),
        Config(format=1, id="../../../etc", chunk_size=CHUNK, created=""),
        Config(format=1, id="0" * 32, chunk_size=1 << 40, created=""),
        Config(format=1, id="0" * 32, chunk_size=-1, created=""),
        Config(format=1, id="0" * 32, chunk_size=CHUNK, created="x" * 1000),
    ],
)
def test_impossible_configs(config: Config) -> None:
    with pytest.raises(DamagedError):
        decode_config(encode_config(config))


def hostile_slot(site: Site, **changes: object) -> None:
    name = names(site, SLOTS)[0]
    slot = decode_json(name, site.store.objects.pop(name), Slot)
    put_named(site.store, f"{SLOTS}{slot.id}.", encode_json(msgspec.structs.replace(slot, **changes)))


@pytest.mark.parametrize(
    "changes",
    [
        {"memory": 1 << 40},
        {"memory": 1},
        {"memory": -1},
        {"iterations": 1 << 31},
        {"iterations": 0},
        {"lanes": 1 << 20},
        {"lanes": 0},
        {"memory": 1 << 20, "iterations": 16},
        {"salt": b""},
        {"sealed": b"x" * 5},
        {"repository": "0" * 32},
    ],
)
def test_hostile_passphrase_parameters_cost_nothing(site: Site, changes: dict[str, object]) -> None:
    hostile_slot(site, **changes)
    with pytest.raises(DamagedError):
        unlock_with_passphrase(site.repository, PASSPHRASE)


def test_a_slot_for_another_recipient_does_not_open(site: Site) -> None:
    hostile_slot(site, recipient="1" * 32)
    with pytest.raises(RefusedError):
        unlock_with_passphrase(site.repository, PASSPHRASE)


def test_thousands_of_slots_are_not_tried(site: Site) -> None:
    for number in range(MAX_SLOTS * 4):
        put_named(site.store, f"{SLOTS}{number:032x}.", b"{}")
    with pytest.raises(DamagedError):
        unlock_with_passphrase(site.repository, "wrong")


def test_a_kit_of_another_repository(site: Site) -> None:
    kit = make_kit(site.repository, site.key)
    strange = replace(kit, repository_id="1" * 32)
    with pytest.raises(RefusedError, match="is for the repository"):
        unlock_with_kit(site.repository, strange.text())


def test_the_kit_as_a_page_is_whole_and_safe(site: Site) -> None:
    kit = make_kit(site.repository, site.key)
    page = replace(kit, location="<script>alert(1)</script>").page()
    assert "<script>" not in page
    svg = page[page.index("<svg") : page.index(">", page.index("<svg"))]
    assert "viewBox" in svg, "it scales with the page: a fixed size would be cut off"
    assert "width" not in svg
    assert kit.repository_id in page
    assert all(line in page for line in kit.lines())
    for outside in ("http://www.w3.org", "xmlns"):
        page = page.replace(outside, "")
    assert "http" not in page


def test_the_kit_can_be_typed_carelessly(site: Site) -> None:
    lines = make_kit(site.repository, site.key).lines()
    swapped = [line.lower().replace("0", "o").replace("1", "l", 2) for line in reversed(lines)]
    typed = [f"{line[0]}. {line[1:].replace(' ', '')}" for line in lines]
    dashed = [f"{line[:3]}{line[3:].replace(' ', '-')}" for line in lines]
    assert unlock_with_kit(site.repository, "\n".join(typed)).id == site.key.id
    assert unlock_with_kit(site.repository, "\r\n".join(dashed)).id == site.key.id
    relaxed = [f"{number}  {line[1:]}" for number, line in zip(range(5, 0, -1), swapped, strict=True)]
    assert unlock_with_kit(site.repository, "\n".join(relaxed)).id == site.key.id


def test_errors_in_a_kit_are_found_in_their_line(site: Site) -> None:
    lines = make_kit(site.repository, site.key).lines()
    for number, line in enumerate(lines):
        wrong = line[:-1] + ("0" if line[-1] != "0" else "7")
        for bad, said in (
            (wrong, "typing error"),
            (line[:-1], "19 letters"),
            (line + "7", "21 letters"),
            (line[:-1] + "!", "'!'"),
            ("", "lacks line"),
        ):
            text = "\n".join([*lines[:number], bad, *lines[number + 1 :]])
            with pytest.raises(RefusedError, match=said) as caught:
                unlock_with_kit(site.repository, text)
            assert str(number + 1) in caught.value.message
    exchanged = [lines[1].replace("2", "1", 1), lines[0].replace("1", "2", 1), *lines[2:]]
    with pytest.raises(RefusedError, match="line 1"):
        unlock_with_kit(site.repository, "\n".join(exchanged))
    with pytest.raises(RefusedError, match="lacks line 1, 2, 3, 4, 5"):
        unlock_with_kit(site.repository, "")
    with pytest.raises(RefusedError):
        unlock_with_kit(site.repository, "\n".join([*lines, "6  AAAA AAAA AAAA AAAA AAAA"]))


def test_machine_keys_are_kept_for_the_owner_only(site: Site, tmp_path: Path) -> None:
    assert load_machine_keys(tmp_path / "state", site.repository) is None
    save_machine_keys(tmp_path / "state", site.keys)
    (file,) = (tmp_path / "state").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    loaded = load_machine_keys(tmp_path / "state", site.repository)
    assert loaded is not None
    assert loaded.stored == site.keys.stored


def test_the_state_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REMETAL_STATE", raising=False)
    assert state_folder() == Path("/var/lib/remetal")
    monkeypatch.setenv("REMETAL_STATE", "/srv/keys")
    assert state_folder() == Path("/srv/keys")


@pytest.mark.parametrize("damage", ["", "{}", "[1]", "cut", "mixed", "\ud800"])
def test_unusable_machine_keys_are_refused(site: Site, tmp_path: Path, damage: str) -> None:
    save_machine_keys(tmp_path, site.keys)
    (file,) = tmp_path.iterdir()
    text = file.read_text()
    if damage == "cut":
        damage = text[:-20]
    elif damage == "mixed":
        other = enroll_machine(site.repository, "other")
        damage = encode_json(msgspec.structs.replace(site.keys.stored, signing_seed=other.stored.signing_seed)).decode()
    file.write_bytes(damage.encode("utf-8", "surrogatepass"))
    with pytest.raises(RefusedError) as caught:
        load_machine_keys(tmp_path, site.repository)
    assert str(file) in caught.value.message


def test_a_state_folder_that_cannot_be_written(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RefusedError):
        save_machine_keys(tmp_path / "file", site.keys)


@pytest.mark.parametrize("name", ["", " ", "x" * 65, "a\nb", "\x1b[31m", "\u202e"])
def test_names_that_no_machine_has(site: Site, name: str) -> None:
    with pytest.raises(UsageError):
        enroll_machine(site.repository, name)


def test_keys_of_another_repository_are_refused(site: Site) -> None:
    other = make_site()
    with pytest.raises(RefusedError), open_session(site.repository, other.keys):
        pass
    with pytest.raises(RefusedError):
        open_catalog(site.repository, other.keys)
    with pytest.raises(RefusedError):
        open_catalog(site.repository, other.key)


def test_a_second_recipient_reads_what_machines_seal_to_it_after_accepting(site: Site, tmp_path: Path) -> None:
    data = os.urandom(2 * CHUNK)
    save_machine_keys(tmp_path, site.keys)
    before = backup(site, data)
    kit = add_recipient(site.repository, site.key, "escrow")
    escrow = unlock_with_kit(site.repository, kit.text())
    assert unlock_with_passphrase(site.repository, "escrow").id == escrow.id != site.key.id
    second = Site(site.store, site.repository, site.keys, escrow)
    assert [each.id for each in open_catalog(site.repository, escrow).snapshots()] == [before.id]
    with pytest.raises(RefusedError, match="does not open all"):
        restore(second, before)
    warnings: list[object] = []
    with open_session(site.repository, site.keys, report=warnings.append):
        pass
    assert escrow.id in str(warnings)
    assert [each.id for each in new_recipients(site.repository, site.keys)] == [escrow.id]
    assert [each.id for each in accept_recipients(site.repository, site.keys)] == [escrow.id]
    assert accept_recipients(site.repository, site.keys) == []
    loaded = load_machine_keys(tmp_path, site.repository)
    assert loaded is not None
    assert len(loaded.stored.recipients) == 2
    changed = os.urandom(CHUNK) + data[CHUNK:]
    after = backup(Site(site.store, site.repository, loaded, site.key), changed)
    assert restore(site, after) == changed
    with pytest.raises(RefusedError, match="does not open all"):
        restore(second, after)  # half of it is in the older pack
    fresh = Site(site.store, site.repository, enroll_machine(site.repository, "db"), escrow)
    assert restore(fresh, backup(fresh, data)) == data


def test_a_recipient_that_nobody_vouches_for_is_ignored_and_told(site: Site) -> None:
    thief = RecipientKey(site.repository.config.id, bytes(32))
    put_recipient(site.store, thief, certifier=thief, created="")
    accomplice = RecipientKey(site.repository.config.id, b"1" * 32)
    put_recipient(site.store, accomplice, certifier=thief, created="")
    forged = RecipientKey(site.repository.config.id, b"2" * 32)
    liar = RecipientKey(site.repository.config.id, b"3" * 32)
    object.__setattr__(liar, "id", site.key.id)  # claims to be the founder, without its signing key
    put_recipient(site.store, forged, certifier=liar, created="")
    keys = enroll_machine(site.repository, "careful")
    assert [each.id for each in keys.stored.recipients] == [site.repository.config.id]
    assert new_recipients(site.repository, site.keys) == []


def test_a_repository_whose_founder_was_replaced_enrolls_nobody(site: Site) -> None:
    for name in names(site, "keys/recipients/"):
        site.store.delete(name)
    thief = RecipientKey(site.repository.config.id, bytes(32))
    put_recipient(site.store, thief, certifier=thief, created="")
    with pytest.raises(DamagedError, match="first recipient"):
        enroll_machine(site.repository, "web2")


def test_a_machine_cannot_read_its_own_packs(site: Site) -> None:
    """Nothing that a machine keeps is a recipient's seed, so nothing that it keeps opens a pack."""
    backup(site, os.urandom(CHUNK))
    stored = site.keys.stored
    for seed in (stored.id_key, stored.catalog_key, stored.signing_seed):
        false = RecipientKey(site.repository.config.id, seed)
        assert false.id != site.key.id
    assert isinstance(site.keys, MachineKeys)
    assert site.key.seed not in encode_json(stored)
    with pytest.raises(RemetalError):
        unlock_with_passphrase(site.repository, stored.id_key.hex())
