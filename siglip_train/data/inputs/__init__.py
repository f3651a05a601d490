"""What a batch can hold: a file for each input, which reads its part of a sample and puts rows together."""
