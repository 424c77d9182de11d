"""`python -m llava_weights`: the command line without the installed script."""

from .cli import main

main()
