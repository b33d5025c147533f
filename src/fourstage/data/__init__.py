"""The four sources, their splits, and batches of them (datamodule)."""

from fourstage.data.chat import load_chat
from fourstage.data.config import DataConfig
from fourstage.data.corpus import Corpus, load_corpus
from fourstage.data.knowledge import fact_questions, load_facts
from fourstage.data.preference import load_preference, load_prompts
from fourstage.data.reasoning import load_reasoning
from fourstage.data.records import (
    Chats,
    Conversation,
    Pair,
    Pairs,
    Problem,
    Problems,
    prompts_only,
)
from fourstage.data.shards import Tokens, tokenized
from fourstage.data.sources import (
    SamplePrompt,
    digest,
    fetched,
    left_out,
    other_source,
    sample_prompts,
    waits,
)
from fourstage.data.userfiles import NOT_READ

__all__ = ["Chats", "Conversation", "Corpus", "DataConfig", "Pair", "Pairs", "Problem", "Problems"]
__all__ += ["SamplePrompt", "Tokens", "fetched", "tokenized", "waits"]
__all__ += ["NOT_READ", "digest", "left_out", "other_source", "prompts_only", "sample_prompts"]
__all__ += ["fact_questions", "load_chat", "load_corpus", "load_facts", "load_preference"]
__all__ += ["load_prompts", "load_reasoning"]
