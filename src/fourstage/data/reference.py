"""The Python language reference, as every interpreter carries it."""

from fourstage.data.split import is_heldout


def language_reference(share: float = 1.0) -> list[str]:
    """A share of the topics of the Python language reference that every interpreter carries (PSF
    licence)."""
    from pydoc_data.topics import topics

    return [topics[name].strip() for name in sorted(topics) if is_heldout(name, share)]
