"""Documents as tokens in memory, as the files in outputs/data/ hold them."""

import numpy as np

from fourstage.data import Tokens
from fourstage.tokenizer import Tokenizer

CHARACTERS = Tokenizer.char()


def tokens_of(
    documents: list[str], tokenizer: Tokenizer = CHARACTERS, part: int | None = None
) -> Tokens:
    """part: tokens in each file."""
    ids = [i for text in documents for i in (tokenizer.bos_id, *tokenizer.encode(text))]
    row, step = np.array(ids, np.uint16), part or len(ids)
    parts = [row[at : at + step] for at in range(0, len(row), step)]
    unknown = 0 if tokenizer.unk_id is None else ids.count(tokenizer.unk_id)
    size = int(tokenizer.bytes[ids].sum())
    return Tokens(parts, sum(map(len, documents)), size, unknown)
