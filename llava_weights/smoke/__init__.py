"""Does a checkpoint compute? Forward passes of transformers' own models, one layer in memory at a time,
compared with a recording or with the unconverted checkpoint."""
