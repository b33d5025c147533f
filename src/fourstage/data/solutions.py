"""The steps and the result of a written solution: gsm8k's, in a box, or in words."""

import re

from fourstage.data.verify import MARK

BOXED = re.compile(
    r"\\(?:boxed|fbox|framebox)(?:\s*\{|\s*(\\frac\{[^{}]*\}\{[^{}]*\}|[^\s{}$\\]+))"
)
SEVERAL = re.compile(  # \boxed{1} or $x = \boxed{2}$
    r"\\boxed\s*\{[^{}]*\}\$?\s*(?:,|or|and)\s*\$?(?:\w+\s*=\s*)?\\boxed\s*\{"
)
HASHES = re.compile(r"[ \t]*#{4,}[ \t]*")  # "##### 42" and "####42" are meant as "#### 42"
ANSWER_WORD = re.compile(r"^(?:the )?(?:final )?answer(?: is)?\s*:\s*(?=\S)", re.IGNORECASE)
ANSWER_IS = re.compile(r"\b(?:the )?(?:final )?answer(?: is)?\s*:\s*(\S[^\n]*)\Z", re.IGNORECASE)
PROSE = re.compile(r"(?<!\\)\b(?!sqrt|frac|sin|cos|tan|log|exp|text|pi\b)[^\W\d_]{2,}")
CALCULATOR = re.compile(r"<<[^<>\n]*=[^<>\n]*>>")
NO_NUMBER = ("nan", "inf", "-inf")  # as Python writes them
LATEST = 5  # boxes to look at, from the end: the last may not be closed


class NoResult(ValueError):
    """A solution without a result, or with several."""

    def __init__(self, message: str, reason: str = "no_result") -> None:
        super().__init__(message)
        self.reason = reason


def solved(text: str) -> tuple[str, str]:
    """The steps and the result. A mark in front of a heading doesn't count. Raises NoResult unless
    there is exactly one result."""
    if text in NO_NUMBER:
        raise NoResult(f"the answer is {text}, which is no number")
    text = CALCULATOR.sub("", text)
    steps, result = _parts(text)
    if not result or "\0" in text:
        raise NoResult(f"nothing follows '{MARK}' in the answer")
    return HASHES.sub("", steps).strip(), result


def _parts(text: str) -> tuple[str, str]:
    in_boxes, marks = boxed(text), list(HASHES.finditer(text))
    if marks:
        before, after = text[: marks[-1].start()], text[marks[-1].end() :]
        begins_a_line = before.rpartition("\n")[2].strip() == ""
        result = _result(after.strip())
        if result is not None and (begins_a_line or in_boxes is None):
            return before, result
    if in_boxes is not None:
        if SEVERAL.search(text):
            raise NoResult("several results are in boxes", "several_results")
        return text, in_boxes
    if marks:
        raise NoResult(f"more than a result follows '{MARK}'")
    if (said := ANSWER_IS.search(text)) and said.start() > 0:
        return text[: said.start()], said[1].strip()
    if "\n" in text and PROSE.search(text):
        raise NoResult(f"no '{MARK}RESULT' and no \\boxed{{RESULT}} in the answer")
    return "", text


def _result(text: str) -> str | None:
    """What follows a mark, without "Answer:" and lines of words after it; None for a heading."""
    lines = [line.strip() for line in text.split("\n") if re.search(r"\w", line)]
    if not lines:
        return text
    lines[0] = ANSWER_WORD.sub("", lines[0])
    if len(lines) > 1 and PROSE.search(" ".join(lines)):
        return None if PROSE.search(lines[0]) else lines[0]
    return "\n".join(lines)


def boxed(text: str) -> str | None:
    r"""The content of a text's last \boxed{...}; None without one."""
    for found in list(BOXED.finditer(text))[: -LATEST - 1 : -1]:
        if found[1]:
            return found[1].rstrip(".,;")
        depth = 1
        for at in range(found.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            if depth == 0:
                return text[found.end() : at].strip()
    return None
