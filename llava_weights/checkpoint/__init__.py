"""A checkpoint as a whole: its tensors, config, tokenizer, processor, chat template, vision tower and manifest.
`open_checkpoint` opens one; inspect.py and diagnose.py say what it is."""
