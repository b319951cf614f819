"""One module a stage: parse the recipe, load, wire, run, write a manifest. Run as `python -m twice_rec.stages.NAME`."""
