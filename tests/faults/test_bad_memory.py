"""Memory or a processor that changes bits, at every stage on the way from a buffer to the store: nobody is told "done".

Each stage is a function whose result is handed on; one bit of the result is flipped, of one call after the other. What
is changed between two stages is the same as a result that is changed. The one result that cannot be looked at is that
of sealing a key: only the recipients can open it. So it is done twice, and one of them may be wrong without any loss.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import zstandard

from remetal.errors import RemetalError
from remetal.events import Event, Report, Warn, silent
from remetal.repository import (
    encoder,
    forget,
    history,
    indexes,
    journal,
    ledgers,
    maps,
    packs,
    parity,
    parity_writer,
    protect,
    records,
    repair,
    session,
    slots,
    snapshots,
)
from remetal.repository.catalog import open_catalog
from remetal.repository.cipher import SEALS, KemPublic
from remetal.repository.forget import forget_snapshots
from remetal.repository.objects import put_named
from remetal.repository.packs import Codec, Contents, Pack, PackBuilder
from remetal.repository.prune import prune_machine
from remetal.repository.repair import repair_repository
from remetal.repository.repository import add_passphrase, unlock_with_passphrase
from remetal.repository.session import open_session
from tests.faults.campaign import World, need_sound
from tests.faults.counting import Count, StartCount
from tests.faults.schedule import InlineExecutor
from tests.repositories import CHUNK, MemoryStore, Site, backup, make_site, noise, write

_TEXT = b"the same again and again, and yet not quite the same " * 1300
_ONE, _TWO = noise("m1", 2) + _TEXT, noise("m2", 2) + noise("m1", 1) + bytes(CHUNK) + _TEXT[::-1]
_FLIPS = 3
"""So many bits of each result are flipped, one in each case, unless it is the full campaign."""


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setattr("remetal.repository.packs.PACK_SIZE", 2 * CHUNK)
    patch.setattr(encoder, "PACKS_PER_INDEX", 2)
    patch.setattr("remetal.repository.slots.MEMORY_KIB", 1 << 10)
    for module in ("session", "encoder"):
        patch.setattr(f"remetal.repository.{module}.ThreadPoolExecutor", InlineExecutor)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def start(small: None) -> World:
    site = make_site()
    return World(site, {backup(site, _ONE, workers=1).id: _ONE})


class Bits:
    """Flips one bit of the result of call number `at`; counts the calls."""

    def __init__(self, at: int = 0, seed: int = 0) -> None:
        self.at, self.calls, self.hits = at, 0, 0
        self._chance = random.Random(f"{at} {seed}")

    def pass_on(self, result: Any) -> Any:
        self.calls += 1
        if self.calls != self.at:
            return result
        self.hits += 1
        return self.flip(result)

    def flip(self, result: Any) -> Any:
        if isinstance(result, tuple):
            return (self.flip(result[0]), *result[1:])
        changed = bytearray(result)
        changed[self._chance.randrange(len(changed))] ^= 1 << self._chance.randrange(8)
        return bytes(changed)


def result_of(owner: Any, name: str) -> Callable[[pytest.MonkeyPatch, Bits], None]:
    """Return what flips bits in the result of a function or method."""

    def put_in(patch: pytest.MonkeyPatch, bits: Bits) -> None:
        real = getattr(owner, name)

        def call(*words: Any, **options: Any) -> Any:
            found = real(*words, **options)
            return bits.pass_on(found) if found not in {b"", None} or isinstance(found, tuple) else found

        patch.setattr(owner, name, call)

    return put_in


class _Wrapped:
    """An object of a library, one of whose methods gives changed results."""

    def __init__(self, inner: Any, method: str, bits: Bits) -> None:
        self._inner, self._method, self._bits = inner, method, bits

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name != self._method:
            return found
        return lambda *words, **options: self._bits.pass_on(found(*words, **options))


def of_library(module: Any, name: str, method: str) -> Callable[[pytest.MonkeyPatch, Bits], None]:
    """Return what flips bits in what a method of a class of a library returns, as a module uses it."""

    def put_in(patch: pytest.MonkeyPatch, bits: Bits) -> None:
        real = getattr(module, name)
        patch.setattr(module, name, lambda *words, **options: _Wrapped(real(*words, **options), method, bits))

    return put_in


def of_compressor(module: Any) -> Callable[[pytest.MonkeyPatch, Bits], None]:
    """Return what flips bits in what Zstandard makes."""

    def put_in(patch: pytest.MonkeyPatch, bits: Bits) -> None:
        class Library:
            ZstdError = zstandard.ZstdError
            ZstdDecompressor = zstandard.ZstdDecompressor
            get_frame_parameters = staticmethod(zstandard.get_frame_parameters)

            @staticmethod
            def ZstdCompressor(**options: Any) -> Any:  # noqa: N802 - as the library calls it
                return _Wrapped(zstandard.ZstdCompressor(**options), "compress", bits)

        patch.setattr(module, "zstandard", Library)

    return put_in


def of_buffer(patch: pytest.MonkeyPatch, bits: Bits) -> None:
    """Flip bits in the plain bytes of a chunk, after they were hashed and before they are compressed."""
    real = encoder.Filling.add

    def add(self: encoder.Filling, identity: bytes, chunk: memoryview, codec: Codec) -> int:
        return real(self, identity, memoryview(bits.pass_on(bytes(chunk))), codec)

    patch.setattr(encoder.Filling, "add", add)


def of_ids(patch: pytest.MonkeyPatch, bits: Bits) -> None:
    """Flip bits in the ids of a batch, after its chunks were stored and before they are put into the map."""
    real = encoder.Worker.encode

    def encode(self: encoder.Worker, first: int, data: memoryview) -> encoder.Encoded:
        found = real(self, first, data)
        ids = bits.pass_on(b"".join(found.ids))
        found.ids[:] = [ids[start : start + 32] for start in range(0, len(ids), 32)]
        return found

    patch.setattr(encoder.Worker, "encode", encode)


def of_finished(kind: str) -> Callable[[pytest.MonkeyPatch, Bits], None]:
    """Return what flips bits in a finished pack that waits to be stored: in its prologue, keys, chunks, or its end."""

    def put_in(patch: pytest.MonkeyPatch, bits: Bits) -> None:
        real = PackBuilder.finish

        def finish(self: PackBuilder, codec: Codec) -> Pack:
            pack = real(self, codec)
            start, end = pack.contents.start, self._end
            places = {"prologue": (0, packs.PROLOGUE.size), "keys": (packs.PROLOGUE.size, start)}
            places |= {"chunks": (start, end), "contents": (end, len(pack.data))}
            first, last = places[kind]
            pack.data[first:last] = bits.pass_on(bytes(pack.data[first:last]))
            return pack

        patch.setattr(PackBuilder, "finish", finish)

    return put_in


def of_filling(kind: str) -> Callable[[pytest.MonkeyPatch, Bits], None]:
    """Return what flips bits in the prologue, the wrapped keys or the chunks of a pack that is about to be finished."""

    def put_in(patch: pytest.MonkeyPatch, bits: Bits) -> None:
        real = PackBuilder.finish

        def finish(self: PackBuilder, codec: Codec) -> Pack:
            places = {"prologue": (0, packs.PROLOGUE.size), "keys": (packs.PROLOGUE.size, self._start)}
            first, last = (places | {"chunks": (self._start, self._end)})[kind]
            self.buffer[first:last] = bits.pass_on(bytes(self.buffer[first:last]))
            if kind == "prologue":
                self._prologue = bytes(self.buffer[first:last])
            return real(self, codec)

        patch.setattr(PackBuilder, "finish", finish)

    return put_in


def of_rows(patch: pytest.MonkeyPatch, bits: Bits) -> None:
    """Flip bits in the table of contents of a pack that is being filled."""
    real = PackBuilder.finish

    def finish(self: PackBuilder, codec: Codec) -> Pack:
        self._rows = bytearray(bits.pass_on(bytes(self._rows)))
        return real(self, codec)

    patch.setattr(PackBuilder, "finish", finish)


def of_contents(patch: pytest.MonkeyPatch, bits: Bits) -> None:
    """Flip bits in what is to be said of a finished pack in the index."""
    real = PackBuilder.finish

    def finish(self: PackBuilder, codec: Codec) -> Pack:
        pack = real(self, codec)
        found = pack.contents
        entries = np.frombuffer(bits.pass_on(found.entries.tobytes()), packs.ENTRY)
        return Pack(Contents(found.identity, found.size, found.start, entries, found.seal), pack.data)

    patch.setattr(PackBuilder, "finish", finish)


def of_pack_name(patch: pytest.MonkeyPatch, bits: Bits) -> None:
    """Flip bits in the hash of a finished pack."""
    real = PackBuilder.finish

    def finish(self: PackBuilder, codec: Codec) -> Pack:
        pack = real(self, codec)
        found = pack.contents
        name = bits.pass_on(found.identity)
        return Pack(Contents(name, found.size, found.start, found.entries, found.seal), pack.data)

    patch.setattr(PackBuilder, "finish", finish)


def of_parity(patch: pytest.MonkeyPatch, bits: Bits) -> None:
    """Flip bits in parity that is about to be stored, in what was XORed so far."""
    for module in (parity_writer, protect):
        _before_parity(patch, module, lambda xor: _change(xor.first(xor._size), bits))


def _before_parity(patch: pytest.MonkeyPatch, module: Any, spoil: Callable[[parity.Xor], None]) -> None:
    real = module.put_parity

    def put(*words: Any) -> parity.Group:
        spoil(words[-1])
        return real(*words)  # type: ignore[no-any-return]

    patch.setattr(module, "put_parity", put)


def of_pack_in_parity(patch: pytest.MonkeyPatch, bits: Bits) -> None:
    """Flip bits in a pack that is stored, before it goes into the parity."""
    real = parity_writer.ParityWriter.add

    def add(self: parity_writer.ParityWriter, pack: Pack, fold: parity.Folded) -> None:
        _change(pack.data, bits)
        real(self, pack, fold)

    patch.setattr(parity_writer.ParityWriter, "add", add)


def of_pieces(module: Any, number: int) -> Callable[[pytest.MonkeyPatch, Bits], None]:
    """Return what flips bits in one of the pieces of an object that is handed over."""

    def put_in(patch: pytest.MonkeyPatch, bits: Bits) -> None:
        real = module.put_hashed

        def put(store: Any, name: str, pieces: Any) -> None:
            changed = list(pieces)
            changed[number] = bits.pass_on(bytes(changed[number]))
            real(store, name, changed)

        patch.setattr(module, "put_hashed", put)

    return put_in


def of_set_aside(patch: pytest.MonkeyPatch, bits: Bits) -> None:
    """Flip bits in what is about to be set aside."""
    patch.setattr(journal, "put_named", lambda store, prefix, data: put_named(store, prefix, bits.pass_on(data)))


def of_sealing(patch: pytest.MonkeyPatch, bits: Bits) -> None:
    """Flip bits in a key after it was handed over to be sealed."""
    real = KemPublic.seal
    patch.setattr(KemPublic, "seal", lambda self, info, data: real(self, info, bits.pass_on(data)))


def _change(data: memoryview, bits: Bits) -> None:
    data[:] = bits.pass_on(bytes(data))


STAGES: dict[str, Callable[[pytest.MonkeyPatch, Bits], None]] = {
    "hash of a chunk": result_of(Codec, "identify"),
    "buffer after the hash": of_buffer,
    "ids before the map": of_ids,
    "zstd of a chunk": of_compressor(packs),
    "AES-GCM of contents": of_library(packs, "AESGCM", "encrypt"),
    "AES-GCM of chunks": of_filling("chunks"),
    "rows of the contents": of_rows,
    "prologue in the making": of_filling("prologue"),
    "keys in the making": of_filling("keys"),
    "prologue before the upload": of_finished("prologue"),
    "keys before the upload": of_finished("keys"),
    "chunks before the upload": of_finished("chunks"),
    "contents before the upload": of_finished("contents"),
    "name of a pack": of_pack_name,
    "contents before the index": of_contents,
    "pack before the parity": of_pack_in_parity,
    "parity in the making": of_parity,
    "name of parity": result_of(parity, "digest"),
    "head of parity before the upload": of_pieces(parity, 0),
    "parity before the upload": of_pieces(parity, 1),
    "body of an index": result_of(indexes, "encode_index"),
    "body of a page": result_of(maps.PageBuilder, "encode"),
    "AES-SIV of index and map": result_of(records, "seal_record"),
    "prefix of index and map": result_of(records, "record_prefix"),
    "name of index and map": result_of(records, "digest"),
    "body of a snapshot or ledger": of_compressor(history),
    "AES-SIV of a snapshot": result_of(snapshots, "seal_record"),
    "clear part of a snapshot": result_of(snapshots, "encode_clear"),
    "clear part of a ledger": result_of(ledgers, "encode_clear"),
    "signature of an entry": result_of(history, "sign"),
    "snapshot before the upload": result_of(session, "encode_snapshot"),
    "ledger before the upload": result_of(forget, "encode_ledger"),
}


REPAIR_STAGES: dict[str, Callable[[pytest.MonkeyPatch, Bits], None]] = {
    "record of a repair": result_of(journal, "encode_json"),
    "name of a record": result_of(journal, "digest"),
    "record before the upload": of_pieces(journal, 0),
    "what is set aside": of_set_aside,
    "rebuilt pack": result_of(repair, "rebuild_from"),
    "rebuilt pack before the upload": of_pieces(repair, 0),
}


def _work(site: Site, report: Report = silent, forgetting: Callable[[], None] = lambda: None) -> dict[str, bytes]:
    """Back up, forget and prune, so that packs and index objects are written anew; tell before forgetting."""
    with open_session(site.repository, site.keys, workers=1, report=report) as work:
        write(work, _TWO)
        made = work.commit(layout=b"{}", hostname="web.example")
    old = next(iter(_snapshots(site) - {made.id}))
    forgetting()
    forget_snapshots(site.repository, site.key, [old])
    prune_machine(site.repository, site.key, site.keys.machine_id, grace=0, max_unused=0)
    return {made.id: _TWO}


def _snapshots(site: Site) -> set[str]:
    return {each.id for each in open_catalog(site.repository, site.key).snapshots()}


@pytest.mark.parametrize("flips", [_FLIPS, pytest.param(100, marks=pytest.mark.faults)], ids=["some", "many"])
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage(start: World, stage: str, flips: int, counts: StartCount) -> None:
    count = counts("bad memory, " + stage)
    with pytest.MonkeyPatch.context() as patch:
        bits = Bits()
        STAGES[stage](patch, bits)
        _work(start.site.copy())
    assert bits.calls
    for at in range(1, bits.calls + 1):
        for seed in range(-(-flips // bits.calls) if flips > bits.calls else 1):
            _flip_once(start, stage, Bits(at, seed), count)
    assert count.detected >= count.cases * 0.4, "so many changes are without effect"


def _flip_once(start: World, stage: str, bits: Bits, count: Count) -> None:
    site = start.site.copy()
    made: dict[str, bytes] = {}
    events: list[Event] = []
    told = forgetting = False

    def note() -> None:
        nonlocal forgetting
        forgetting = True

    with pytest.MonkeyPatch.context() as patch:
        STAGES[stage](patch, bits)
        try:
            made = _work(site, events.append, note)
        except RemetalError:
            told = True
    told = told or any(isinstance(each, Warn) and "miscalculates" in each.hint for each in events)
    with count.case((stage, bits.at)):
        assert bits.hits == 1
        first = next(iter(start.expected))
        expected = {} if forgetting and first not in _snapshots(site) else dict(start.expected)
        need_sound(World(site, expected | made, {} if made else {"": _TWO}))  # untold, so it was without effect
    if told:
        count.told()


SEALING: dict[str, Callable[[pytest.MonkeyPatch, Bits], None]] = {
    "sealed key": result_of(KemPublic, "seal"),
    "key that is being sealed": of_sealing,
}


@pytest.mark.parametrize("flips", [_FLIPS, pytest.param(100, marks=pytest.mark.faults)], ids=["some", "many"])
@pytest.mark.parametrize("stage", SEALING)
def test_a_key_that_was_sealed_badly_is_no_loss(stage: str, flips: int, counts: StartCount) -> None:
    """Nobody but a recipient can look at it, so nobody is told: every snapshot and its machine's secrets open."""
    count = counts("bad memory, " + stage)
    with pytest.MonkeyPatch.context() as patch:
        bits = Bits()
        SEALING[stage](patch, bits)
        expected = _enrol_and_work()[1]
    assert bits.calls >= 2 * SEALS
    for at in range(1, bits.calls + 1):
        for seed in range(-(-flips // bits.calls)):
            bits = Bits(at, seed)
            with pytest.MonkeyPatch.context() as patch:
                SEALING[stage](patch, bits)
                site, expected = _enrol_and_work()
            with count.case((stage, at, seed)):
                assert bits.hits == 1
                need_sound(World(site, expected, {}))


def _enrol_and_work() -> tuple[Site, dict[str, bytes]]:
    """Make a repository and a machine, back up twice, and prune."""
    site = make_site()
    backup(site, _ONE, workers=1)
    return site, _work(site)


@pytest.mark.parametrize("flips", [_FLIPS, pytest.param(100, marks=pytest.mark.faults)], ids=["some", "many"])
@pytest.mark.parametrize("stage", REPAIR_STAGES)
def test_every_stage_of_a_repair(start: World, stage: str, flips: int, counts: StartCount) -> None:
    """What a repair writes down decides what an undo deletes and brings back."""
    count = counts("bad memory, " + stage)
    broken = start.site.copy()
    name = next(entry.name for entry in broken.store.entries("packs/"))
    broken.store.objects[name] = broken.store.objects[name][:-1] + b"?"
    with pytest.MonkeyPatch.context() as patch:
        bits = Bits()
        REPAIR_STAGES[stage](patch, bits)
        assert repair_repository(_unlocked(broken).repository, None).rebuilt == 1
    assert bits.calls
    for at in range(1, bits.calls + 1):
        for seed in range(-(-flips // bits.calls)):
            site = _unlocked(broken)
            with pytest.MonkeyPatch.context() as patch:
                REPAIR_STAGES[stage](patch, Bits(at, seed))
                try:
                    repair_repository(site.repository, None)
                except RemetalError:
                    count.told()
            with count.case((stage, at)):
                need_mended(site, start, _unlocked(broken).store.objects)
    assert count.detected == count.cases


def need_mended(site: Site, start: World, broken: dict[str, bytes]) -> None:
    """A repair without the fault mends everything, and all that was done can be taken back."""
    site, other = _unlocked(site), _unlocked(site)
    repair_repository(site.repository, site.key)
    need_sound(World(site, start.expected))
    while journal.last_repair(other.store) is not None:
        repair.undo_repair(other.repository, None)
    assert _unlocked(other).store.objects == broken


def _unlocked(site: Site) -> Site:
    """Return what a computer that is switched off leaves to others."""
    store = MemoryStore({name: data for name, data in site.store.objects.items() if not name.startswith("locks/")})
    return Site(store, site.repository, site.keys, site.key).copy()


def test_a_passphrase_that_opens_nothing_is_not_stored(start: World, counts: StartCount) -> None:
    """Argon2id fills 64 MiB of memory: of all that is computed it is what bad memory hits first."""
    count = counts("bad memory, passphrases")
    site = start.site.copy()
    for put_in in (result_of(slots, "stretch"), of_library(slots, "AESGCM", "encrypt")):
        with pytest.MonkeyPatch.context() as patch:
            put_in(patch, Bits(1))
            with count.case(), pytest.raises(RemetalError, match="slot"):
                add_passphrase(site.repository, site.key, "another")
        count.told()
        assert site.store.objects == start.site.store.objects
    add_passphrase(site.repository, site.key, "another")
    assert unlock_with_passphrase(site.repository, "another") == site.key
