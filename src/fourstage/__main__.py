"""The commands besides train.py: python -m fourstage COMMAND key=value …, or fourstage …"""

import sys
from importlib import import_module

from fourstage.errors import UserError, did_you_mean
from fourstage.interruptions import run_command

COMMANDS = {  # name -> where its main() is, and what it does
    "report": ("report", "one page and one table of all stages: outputs/report/"),
    "chat": ("chat", "talk to the model of any stage"),
    "runs": ("runs.__main__", "list, show and remove runs"),
    "data": ("data.__main__", "list, check and remove tokenized corpora"),
    "search": ("search.__main__", "search for settings, by Optuna; trials are runs of train.py"),
    "evaluation": ("evaluation.__main__", "evaluate a finished run again"),
    "export": ("exchange.__main__", "a run as a folder that transformers, vLLM and llama.cpp read"),
    "benchmark": ("evaluation.benchmark", "measure a run by public benchmarks, through lm-eval"),
    "arena": ("arena.__main__", "a web page where every stage answers, and you vote"),
    "dashboard": ("tracking.dashboard", "a W&B workspace and report over all runs"),
    "model": ("model.__main__", "the shipped models and their sizes"),
    "scaling": ("parallel.memory", "what each model takes of a GPU's memory"),
}

HELP = "\n".join(
    [
        "usage: python -m fourstage COMMAND [key=value …]",
        *(f"  {name:12}{what}" for name, (_, what) in COMMANDS.items()),
        "COMMAND --help says more; python train.py --help, how to train",
    ]
)
__doc__ = HELP


def main() -> None:
    """Run the command, or list all of them if there is none."""
    if sys.argv[1:2] == ["help"] and len(sys.argv) > 2:  # `help chat` is `chat --help`
        sys.argv[1:] = [sys.argv[2], "--help"]
    if len(sys.argv) > 1 and sys.argv[1] in COMMANDS:
        module, _ = COMMANDS[sys.argv.pop(1)]
        run_command(import_module(f"fourstage.{module}").main)
    run_command(list_commands)


def list_commands(arguments: list[str]) -> None:
    """Print them. Raises UserError for an unknown command."""
    if arguments and arguments != ["help"]:
        word = arguments[0][:40]
        hint = "to train: python train.py" if word == "train" else did_you_mean(word, COMMANDS)
        raise UserError(f"unknown command {word!r}: {hint}")
    print(HELP)


if __name__ == "__main__":
    main()
