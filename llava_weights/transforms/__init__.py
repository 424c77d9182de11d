"""Checkpoints made from checkpoints without reading a weight: deltas, LoRAs, the other layout.
The result is as lazy as its sources."""
