"""A checkpoint becomes files: the plan, one shard after another, the work folder that survives every crash, the upload.
This is the only room that writes weights."""
