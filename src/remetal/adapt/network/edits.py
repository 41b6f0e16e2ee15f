"""What planners of network configuration share: addresses that match a card follow it, others are told. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from remetal.adapt.network.addresses import address_of, find_addresses, parse_address, spell_address
from remetal.adapt.network.cards import Cards
from remetal.adapt.text import Edit


def edit_addresses(text: str, cards: Cards, start: int, end: int, key: str) -> Iterator[Edit]:
    """Yield an edit for each address in a part of a text whose card is another one now; `key` stands in front of it."""
    for first, last, address in find_addresses(text, start, end):
        new = cards.new_address(address)
        if new:
            new = spell_address(new, text[first:last])
            yield Edit(first, last, new, f"{key}{new} replaces {text[first:last]}")


def edit_address(text: str, cards: Cards, start: int, end: int, key: str) -> Iterator[Edit]:
    """Yield the edit for a part of a text that is an address as a whole, in any way of writing one."""
    new = cards.new_address(parse_address(text[start:end]))
    if new:
        new = spell_address(new, text[start:end])
        yield Edit(start, end, new, f"{key}{new} replaces {text[start:end]}")


def note_lost(text: str, cards: Cards, start: int, end: int, path: str) -> Iterator[str]:
    """Yield a note for each address by which a file knows a card that has become none."""
    for _, _, address in find_addresses(text, start, end):
        card = cards.find_by_address(address)
        if card is not None and card.now is None:
            yield f"{path} knows {card.called} by its address, {address}, and it has become no card of this machine"


def note_set(text: str, cards: Cards, start: int, end: int, path: str, key: str) -> Iterator[str]:
    """Yield a note where a file gives an interface the very address that an old card had: somebody may rely on it."""
    for address in {parse_address(text[start:end])} - {""}:
        for card in cards.moved():
            if address == address_of(card.before):
                yield (
                    f"{path}: {key} sets the address that the old {card.called} had, {address}; it was left as it is, "
                    f"so the new card bears it, too"
                )
