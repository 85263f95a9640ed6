"""`python -m fxopt` is `fxopt`."""

from fxopt.cli import main

main()
