"""The synthetic data set: scenes of coloured shapes, their images, and captions that are true of them."""
