"""The chat source: conversations without any held-out prompt, and worked problems."""

from fourstage.data.config import DataConfig, cached
from fourstage.data.heldout import cleaned, split_chats
from fourstage.data.reasoning import worked_problems
from fourstage.data.records import Chats, Conversation, Problem, Split, content_digest, prompt_text
from fourstage.data.split import is_heldout


@cached("chat", "preference", "reasoning", "knowledge")
def load_chat(config: DataConfig) -> Chats:
    """Conversations for sft.

    Raises:
        UserError: no path under data=files, a bad file, or a side of the split with nothing on it.
    """
    chat = config.chat
    config.check_given("chat")
    chats = cleaned(
        config, "data.chat", split_chats(config), lambda c, keys: keys.in_messages(c.messages)
    )
    worked, heldout_worked = worked_problems(config, chat.demonstrations, config.heldout)
    train = chats.train + demonstrations(worked, chat.terse)
    heldout = chats.heldout + demonstrations(heldout_worked, chat.terse)
    texts = (prompt_text(c.messages) for c in train + heldout)
    return Split(train, heldout, content_digest(str(len(train)), *texts), chats.notes)


def demonstrations(problems: list[Problem], terse: dict[str, float]) -> list[Conversation]:
    """Solved problems as conversations; of each task a share, `terse`, without the steps."""
    return [
        p.conversation(terse=is_heldout(f"terse {p.question}", terse.get(p.task, 0.0)))
        for p in problems
    ]
