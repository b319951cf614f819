"""Stage 4 and 5's library: predictions of every kind of model, the CF baselines, tables and the report."""
