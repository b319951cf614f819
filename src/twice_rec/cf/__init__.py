"""Collaborative filtering: SASRec, the baselines, and their scores as confidences for stage 3."""
