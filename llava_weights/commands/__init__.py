"""The commands, one function each: parse, call, hand to the console. `cli.py` gives them their names."""
