"""Bytes from somewhere and to somewhere: local files, the Hub, object stores, HTTP; written at once or not at all, tried again.
Knows no tensor and no model."""
