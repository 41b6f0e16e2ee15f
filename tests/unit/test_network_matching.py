"""Which network card becomes which."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec.structs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from remetal.adapt.network.addresses import address_of, find_addresses, parse_address, spell_address
from remetal.adapt.network.matching import Choice, match_nics, parse_choices
from remetal.errors import UsageError
from remetal.layout.model import Nic
from tests.network_systems import NEW, NEW_2, OLD, OLD_2, card

WIFI = card("wlp1s0", "a4:b1:c1:11:22:33", "iwlwifi", "04:00.0", kind="wlan")


def told(before: list[Nic], now: list[Nic], chosen: tuple[Choice, ...] = ()) -> list[tuple[str, str, bool]]:
    return [(each.now.name if each.now else "", each.reason, each.is_guess) for each in match_nics(before, now, chosen)]


def test_the_same_address_goes_before_the_same_slot() -> None:
    swapped = [
        msgspec.structs.replace(OLD, path=OLD_2.path, place=OLD_2.place, name="b"),
        msgspec.structs.replace(OLD_2, path=OLD.path, place=OLD.place, name="a"),
    ]
    assert told([OLD, OLD_2], swapped) == [
        ("b", "it has the same address", False),
        ("a", "it has the same address", False),
    ]


def test_a_bond_covers_an_address_but_not_the_permanent_one() -> None:
    bonded = [msgspec.structs.replace(each, mac=OLD.mac) for each in (OLD, OLD_2)]
    assert [name for name, _, _ in told(bonded, [OLD_2, OLD])] == ["ens3", "ens4"]


def test_the_same_slot_and_driver_then_the_same_driver_in_order() -> None:
    same = card("ens3", "b4:00:00:00:00:01", "virtio_net", "00:03.0")
    assert told([OLD], [same, NEW]) == [("ens3", "it has the same driver in the same slot, pci-0000:00:03.0", False)]
    ports = [card(f"p{bus}", f"b4:00:00:00:00:{bus}", "virtio_net", f"{bus}:00.0") for bus in ("10", "02")]
    assert told([OLD_2, OLD], [*ports, NEW]) == [
        ("p10", "it is the second with the same driver", False),
        ("p02", "it is the first with the same driver", False),
    ]


def test_an_old_record_without_paths_is_matched_by_its_places() -> None:
    old = Nic(name="eth0", mac="52:54:00:00:00:01", driver="e1000", place="0000:00:03.0")
    new = card("enp0s3", "52:54:00:00:00:02", "e1000")
    assert told([old], [new, NEW])[0] == ("enp0s3", "it has the same driver in the same slot, pci-0000:00:03.0", False)


def test_the_only_one_that_is_left_on_both_sides() -> None:
    assert told([OLD], [NEW]) == [("enp1s0", "it is the only card", False)]
    assert told([OLD, NEW_2], [NEW_2, NEW])[0] == ("enp1s0", "it is the only card that is left", False)


def test_what_is_left_is_guessed_and_said_to_be() -> None:
    assert told([OLD_2, OLD], [NEW_2, NEW]) == [
        ("enp2s0", "it was guessed, by the order of the slots", True),
        ("enp1s0", "it was guessed, by the order of the slots", True),
    ]
    linked = msgspec.structs.replace(NEW_2, carrier=True)
    assert told([OLD], [NEW, linked]) == [("enp2s0", "it was guessed, as it has a link", True)]
    assert told([OLD], [NEW, NEW_2]) == [("enp1s0", "it was guessed, by the order of the slots", True)]
    live = msgspec.structs.replace(OLD_2, carrier=True)
    assert told([OLD, live], [NEW]) == [
        ("", "none is left", False),
        ("enp1s0", "it was guessed, by the order of the slots, those that had a link first", True),
    ]


def test_wireless_cards_are_no_wired_ones() -> None:
    assert told([OLD], [WIFI]) == [
        ("", "none of its kind is left; there are wlp1s0 (a4:b1:c1:11:22:33, iwlwifi)", False)
    ]
    old = Nic(name="wlan0", mac="00:11:22:33:44:55", driver="ath9k")
    assert told([OLD, old], [WIFI, NEW]) == [
        ("enp1s0", "it is the only card", False),
        ("wlp1s0", "it is the only card that is left", False),
    ]


def test_a_virtual_function_is_not_taken_unasked_but_is_known_again() -> None:
    function = msgspec.structs.replace(NEW_2, virtual=True)
    assert told([OLD], [function, NEW])[0][0] == "enp1s0"
    assert told([function], [NEW, function]) == [("enp2s0", "it has the same address", False)]


def test_two_cards_with_one_address_are_told_apart_by_their_drivers() -> None:
    """A virtual function stands beside the card of the hypervisor on Azure."""
    pair = [card("eth0", "00:0d:3a:00:00:01", driver, "") for driver in ("hv_netvsc", "mlx5_core")]
    assert [
        name for name, _, _ in told(pair, [msgspec.structs.replace(each, name=each.driver) for each in reversed(pair)])
    ] == [
        "hv_netvsc",
        "mlx5_core",
    ]


def test_what_was_chosen_counts_first() -> None:
    chosen = parse_choices(["ens3=enp2s0", "52-54-00-12-34-57=none"], [OLD, OLD_2], [NEW, NEW_2])
    assert told([OLD, OLD_2], [NEW, NEW_2], chosen) == [
        ("enp2s0", "it was chosen", False),
        ("", "none was chosen for it", False),
    ]
    assert told([OLD_2], [NEW, NEW_2], parse_choices(["ens3=enp1s0"], [OLD, OLD_2], [NEW, NEW_2]))[0][0] == "enp2s0"
    assert parse_choices(["enp0s3=B4:45:06:AA:BB:01"], [OLD], [NEW]) == (Choice(OLD, NEW),)
    assert parse_choices(["lan=enp1s0"], [], [NEW]) == (Choice(Nic(name="lan", mac=""), NEW),)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ens3"], "not OLD=NEW"),
        (["ens3="], "not OLD=NEW"),
        (["eth9=enp1s0"], "captured machine has no network card eth9"),
        (["ens3=eth9"], "this machine has no network card eth9"),
        (["ens3=enp1s0", "enp0s3=enp2s0"], "names the captured card enp0s3 twice"),
        (["ens3=enp1s0", "52:54:00:12:34:56=none"], "twice"),
        (["ens3=enp1s0", "ens4=b4:45:06:aa:bb:01"], "to two cards, ens3 and ens4"),
    ],
)
def test_contradictory_choices_are_refused_with_what_there_is(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        parse_choices(words, [OLD, OLD_2], [NEW, NEW_2])
    assert raised.value.hint


nics = st.builds(
    Nic,
    name=st.sampled_from(["eth0", "eth1", "enp1s0", "wlan0", "", "x" * 40]),
    mac=st.sampled_from(["52:54:00:00:00:01", "52:54:00:00:00:02", "", "00:00:00:00:00:00", "nonsense"]),
    driver=st.sampled_from(["e1000e", "virtio_net", ""]),
    place=st.sampled_from(["0000:00:03.0", "0000:00:04.0", "virtio0", ""]),
    permanent=st.sampled_from(["", "52:54:00:00:00:03"]),
    kind=st.sampled_from(["", "wlan"]),
    carrier=st.booleans(),
    virtual=st.booleans(),
)


@dataclass
class Drawn:
    before: list[Nic]
    now: list[Nic]
    chosen: tuple[Choice, ...]


@st.composite
def machines(draw: st.DrawFn) -> Drawn:
    before, now = draw(st.lists(nics, max_size=5)), draw(st.lists(nics, max_size=5))
    words = draw(
        st.lists(
            st.sampled_from([f"{a}={b}" for a in ("eth0", "eth1") for b in ("eth0", "enp1s0", "none")]), max_size=2
        )
    )
    try:
        return Drawn(before, now, parse_choices(words, before, now))
    except UsageError:
        return Drawn(before, now, ())


@given(machines())
def test_no_card_is_taken_twice_and_all_are_answered(drawn: Drawn) -> None:
    matches = match_nics(drawn.before, drawn.now, drawn.chosen)
    assert [each.before for each in matches] == drawn.before
    for nic in {address_of(each.now) for each in matches if each.now}:
        taken = [each for each in matches if each.now and address_of(each.now) == nic]
        assert len(taken) <= sum(address_of(each) == nic for each in drawn.now)
    assert all(each.now is None or each.now in drawn.now for each in matches)
    assert all(each.reason for each in matches)
    assert match_nics(drawn.before, drawn.now, drawn.chosen) == matches


def test_ways_of_writing_an_address() -> None:
    for text in (
        "52:54:00:12:34:56",
        "52-54-00-12-34-56",
        "5254.0012.3456",
        "52:54:00:12:34:56".upper(),
        "82;84;0;18;52;86;",
    ):
        assert parse_address(text) == "52:54:00:12:34:56"
        assert parse_address(spell_address("0a:bb:00:12:34:56", text)) == "0a:bb:00:12:34:56"
    assert spell_address("0a:bb:cc:00:00:01", "AA-AA-AA-AA-AA-AA") == "0A-BB-CC-00-00-01"
    for text in ("", "00:00:00:00:00:00", "ff:ff:ff:ff:ff:ff", "52:54:00", "52:54-00:12:34:56", "300;1;1;1;1;1", "x"):
        assert parse_address(text) == ""
    infiniband = ":".join(["80"] + ["01"] * 19)
    assert parse_address(infiniband) == infiniband
    assert list(find_addresses("fe80::52:54:00:12:34:56 a52:54:00:12:34:56 (52:54:00:12:34:56)")) == [
        (44, 61, "52:54:00:12:34:56")
    ]
