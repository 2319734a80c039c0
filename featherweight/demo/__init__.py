"""Trained networks that come with the package, so that everything can be tried with nothing but the install."""
