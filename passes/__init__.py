"""The library of passes that comes with fxopt."""
