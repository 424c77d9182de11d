"""`python -m llava_weights`: the command line without the installed script."""

from .cli.main import main

main()
