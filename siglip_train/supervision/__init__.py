"""What watches over a run: stop signals, the log of each rank, and that all ranks run the same program."""
