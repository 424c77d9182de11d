"""A model as a whole: its tensors, config, tokenizer, processor, chat template, vision tower and manifest.
`open_checkpoint` recognises what lies in a folder; `inspect` and `diagnose` say what it is."""
