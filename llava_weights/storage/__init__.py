"""Bytes read from local files, the Hub, object stores and HTTP, with retries; files written at once or not at all.
Knows no tensor and no model."""
