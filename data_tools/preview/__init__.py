"""A page of random samples, to look at before a run is paid for."""
