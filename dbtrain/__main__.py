"""`python -m dbtrain`: the command where only the interpreter is known, as in a job on a cluster."""

from dbtrain.cli.main import main

if __name__ == "__main__":
    main()
