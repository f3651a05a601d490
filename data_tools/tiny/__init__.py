"""The synthetic data set: scenes of coloured shapes, their pictures, and captions that are true of them."""
