"""The toy base model of the tiny recipes: how it was made. Not part of the package `twice_rec`."""
