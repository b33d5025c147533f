"""`python -m fourstage report`."""

from fourstage.interruptions import run_command
from fourstage.report import main

if __name__ == "__main__":
    run_command(main)
