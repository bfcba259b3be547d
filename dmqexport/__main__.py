"""`python -m dmqexport`, and so `torchrun -m dmqexport`."""

from dmqexport.cli import main

if __name__ == "__main__":
    main()
