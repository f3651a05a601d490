"""Boxes with texts for the decoder, found in the images of shards by an open-vocabulary detector."""
