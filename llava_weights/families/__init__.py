"""Everything known about models, as tables: a row for each decoder, tower, target, original and prompt, and functions that read rows.

Code outside this room names no model; what no row describes is refused by name.
Sources: haotian-liu/LLaVA at 8959d5c, 74f8877 and c121f04, LLaVA-VL/LLaVA-NeXT, transformers 4.28-5.23, the Hub pages of the files.
"""
