"""The same training job written with each peer, as its documentation shows it."""
