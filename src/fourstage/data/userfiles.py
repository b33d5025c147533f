"""A user's files to the two sides of a source, and counts of what could not be used."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from fourstage.data.config import SourceConfig
from fourstage.data.files import Row, read_rows
from fourstage.data.keys import keys_of, openings
from fourstage.data.records import Conversation, Pair, Problem, Split, opening
from fourstage.data.schemas import Unusable
from fourstage.data.split import is_heldout

NOT_READ = "not_read_"  # in front of a field's name, in notes
T = TypeVar("T")
Item = TypeVar("Item", Conversation, Pair, Problem)


def usable(rows: Iterable[Row], build: Callable[[Row], T], notes: Counter[str]) -> Iterator[T]:
    """What `build` makes of the rows. Notes count the rows that were left out, "unusable_REASON",
    and those with data in a field that nothing reads, "not_read_FIELD". Raises UserError for a row
    of another schema, or if no row can be used."""
    is_empty, first = True, None
    for row in rows:
        try:
            built = build(row)
        except Unusable as error:
            first = first or error
            notes[f"unusable_{error.reason}"] += 1
        else:
            notes.update(f"{NOT_READ}{name}" for name in row.unread())
            is_empty = False
            yield built
    if is_empty and first is not None:
        raise first


def split_file(
    source: SourceConfig, build: Callable[[Row], Item], share: float, problems: Sequence[Problem]
) -> Split[Item]:
    """A source's file on two sides; `heldout_path` is the held-out side where it is given.

    share: of the items, to hold out. problems: held-out ones, which no source may train on. Raises
    UserError for a bad file, or as `usable`.
    """
    assert source.path is not None
    notes = Counter[str]()
    items = list(usable(read_rows(source.path, source.columns), build, notes))
    given = None
    if source.heldout_path is not None:
        given = list(usable(read_rows(source.heldout_path, source.columns), build, notes))
    train, heldout = sides(items, given, share, problems)
    if given is not None:
        notes["dropped_from_train_as_heldout"] = len(items) - len(train)
    return Split(train, heldout, notes=dict(notes))


def sides(
    items: list[Item], given: list[Item] | None, share: float, problems: Sequence[Problem]
) -> tuple[list[Item], list[Item]]:
    """Train and held-out items; without `given` held-out ones, by the hash of how an item opens."""
    keys = keys_of(problems, openings(given or []))

    def is_held(item: Item) -> bool:
        text = opening(item.prompt_messages)
        return keys.hold(text) or (given is None and is_heldout(text, share))

    held = [is_held(item) for item in items]
    train = [item for item, out in zip(items, held, strict=True) if not out]
    if given is None:
        given = [item for item, out in zip(items, held, strict=True) if out]
    return train, given
