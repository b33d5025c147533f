"""The worst judge: it runs whatever it is given. What the sandbox is for."""


def prepare(item: str) -> None: ...


def judge(item: str) -> object:
    return eval(item, {"__builtins__": __builtins__})
