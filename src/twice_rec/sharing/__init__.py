"""What is given to others: a folder with a model, its card and its results, and its way to the hub."""
