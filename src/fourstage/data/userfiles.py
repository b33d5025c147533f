"""Files and sets on the hub to the two sides of a source, and counts of what could not be used."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from fourstage.data.config import DataConfig, SourceConfig
from fourstage.data.files import Row, iter_rows
from fourstage.data.hub import hub_rows
from fourstage.data.keys import keys_of, openings
from fourstage.data.records import Conversation, Pair, Problem, Split, opening
from fourstage.data.schemas import Unusable
from fourstage.data.split import is_heldout
from fourstage.errors import UserError

NOT_READ = "not_read_"  # in front of a field's name, in notes
T = TypeVar("T")
Item = TypeVar("Item", Conversation, Pair, Problem)


def rows_of(config: DataConfig, name: str, heldout: bool = False) -> Iterator[Row]:
    """The rows of one side of a source, in our names of fields.

    name: "corpus", "chat", "preference" or "reasoning". Raises UserError for a bad file, or if the
    set can't be fetched from the hub.
    """
    source: SourceConfig = getattr(config, name)
    wanted = source.on_hub(heldout)
    if wanted is None:
        path = source.heldout_path if heldout else source.path
        assert path is not None
        yield from iter_rows(path, source.columns)
        return
    try:
        yield from hub_rows(wanted, source.columns, config.root)
    except UserError as error:
        raise UserError(f"data.{name}: {error}") from None


def usable(
    rows: Iterable[Row], build: Callable[[Row], T], notes: Counter[str], most: int | None = None
) -> Iterator[T]:
    """What `build` makes of the rows, the first `most` at most. Notes count the rows that were left
    out, "unusable_REASON", and those with data in a field that nothing reads, "not_read_FIELD".
    Raises UserError for a row of another schema, or if no row can be used."""
    found, first = 0, None
    for row in rows:
        try:
            built = build(row)
        except Unusable as error:
            first = first or error
            notes[f"unusable_{error.reason}"] += 1
            continue
        notes.update(f"{NOT_READ}{name}" for name in row.unread())
        found += 1
        yield built
        if found == most:
            break
    if not found:
        raise first or UserError("no records: give a split or a file with data in it")


def split_file(
    config: DataConfig, name: str, build: Callable[[Row], Item], problems: Sequence[Problem]
) -> Split[Item]:
    """A source's file on two sides; the held-out side is what the source gives as such, or else a
    share, `config.heldout`.

    problems: held-out ones, which no source may train on. Raises UserError as `rows_of` and
    `usable`.
    """
    source: SourceConfig = getattr(config, name)
    notes = Counter[str]()
    items = list(usable(rows_of(config, name), build, notes, source.max_records))
    given = None
    if source.has_heldout:
        held = rows_of(config, name, heldout=True)
        given = list(usable(held, build, notes, source.max_records))
    train, heldout = sides(items, given, config.heldout, problems)
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
