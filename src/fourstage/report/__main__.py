"""`python -m fourstage report`."""

from fourstage.report import main

if __name__ == "__main__":
    from fourstage.interruptions import run_command

    run_command(main)
